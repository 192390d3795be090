"""What nvcc made of every CUDA kernel, read off the compiled extension: needs no GPU."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from dynaprune_kernels import _extension, info
from tests.cuda import resources
from tests.cuda.resources import Kernel

pytestmark = [pytest.mark.gpu_offline, pytest.mark.timeout(600), pytest.mark.slow]

WITH_PRODUCT = re.compile("forward|dgrad|wgrad|product|probe")  # in a kernel's name


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    """The extension's kernels. CI that has an nvcc must have the extension and the tools to look into it."""
    library = _extension.find("_C_cuda")
    missing = str(_extension.load_cuda().reason) if library is None else None
    if missing is None and (resources.cuobjdump() is None or shutil.which("c++filt") is None):
        missing = "cuobjdump (triton, the CUDA toolkit) or c++filt (binutils) is not installed"
    if missing is not None and os.environ.get("CI") == "true" and resources.NVCC is not None:
        pytest.fail(missing)
    if library is None or missing is not None:
        pytest.skip(str(missing))
    if info._stale(library, info._CUDA_SOURCES):
        pytest.fail(f"{library} is older than its sources: run `make ext`")
    return resources.kernels(library)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI must build for the default architectures")
def test_both_architectures_are_compiled(compiled: list[Kernel]) -> None:
    assert {k.architecture for k in compiled} == {"80", "90a"}


def test_nothing_spills(compiled: list[Kernel]) -> None:
    spilling = [k for k in compiled if k.stack_bytes or k.local_bytes or k.spills]
    assert compiled and spilling == []


def test_shared_memory_fits(compiled: list[Kernel]) -> None:
    # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": a thread block has 163 KB
    # on 8.0, but 99 KB on 8.6 and 8.9, which run the same code; 227 KB on 9.0.
    most = {"90a": 227 * 1024}
    over = [
        k
        for k in compiled
        if k.static_shared_bytes + k.dynamic_shared_bytes > most.get(k.architecture, 99 * 1024)
    ]
    assert over == []
    assert all(k.dynamic_shared_bytes for k in compiled if WITH_PRODUCT.search(k.name))


def test_products_run_on_tensor_cores(compiled: list[Kernel]) -> None:
    assert [k for k in compiled if bool(k.hmma or k.hgmma) != bool(WITH_PRODUCT.search(k.name))] == []


def test_products_read_16_bytes_at_a_time_ahead_of_their_use(compiled: list[Kernel]) -> None:
    assert [k for k in compiled if (k.hmma and not k.ldgsts) or (k.hgmma and not k.utmaldg)] == []


def test_hopper_has_kernels_of_its_own(compiled: list[Kernel]) -> None:
    if not any(k.architecture == "90a" for k in compiled):
        pytest.skip("not compiled for 9.0a")
    families = {re.sub(r"<\w+, sm90::(\w+).*", r" of \1", k.name) for k in compiled if k.hgmma}
    assert families == {
        *(f"sm90::product_sm90_kernel of {rows}" for rows in ("Tokens", "OutputPixels", "InputPixels")),
        *(f"sm90::wgrad_sm90_kernel of {inputs}" for inputs in ("TokenInputs", "SeenInputs")),
    }
    assert all(k.architecture == "90a" for k in compiled if k.name.startswith("sm90::"))


def test_the_table_is_what_is_compiled(compiled: list[Kernel]) -> None:
    made_by, table = resources.read_table()
    if made_by != resources.compiler():
        reason = f"resources.csv was written with {made_by}, this is {resources.compiler()}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; `python -m tests.cuda.resources` writes it anew")
        pytest.skip(reason)
    built = {k.architecture for k in compiled}
    table = [row for row in table if row["architecture"] in built]
    rows = [
        row for row in resources.rows(compiled) if row["architecture"] in {r["architecture"] for r in table}
    ]
    changed = [(old, new) for old, new in zip(table, rows, strict=False) if old != new]
    assert table == rows, (
        f"{len(table)} rows in the table, {len(rows)} compiled, first differences {changed[:3]}; "
        f"`python -m tests.cuda.resources` writes it anew"
    )
