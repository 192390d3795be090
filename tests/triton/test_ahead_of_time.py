"""Compiles every kernel for Ampere, Hopper and Blackwell, without a GPU, and looks at what came out."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
from packaging.version import Version

if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = [pytest.mark.gpu_offline, pytest.mark.timeout(900), pytest.mark.slow]

import triton  # noqa: E402

from tests.triton.resources import (  # noqa: E402
    Resources,
    Variant,
    read_table,
    resources,
    row,
    shared_limit,
    variants,
)

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
WITHOUT_PRODUCT = {
    "sum_splits_kernel",
    "block_saliency_kernel",
    "neuron_saliency_kernel",
    "claim_kernel",
    "free_kernel",
    "assign_kernel",
    "count_kernel",
    "emit_kernel",
}
# From Hopper on, the product needs these float32 tiles transposed, and Triton then copies element by element.
SMALL_COPIES = {("fp32", "conv2d_wgrad_kernel"), ("fp32", "conv2d_probe_kernel")}
VARIANTS = list(variants())


@pytest.fixture(scope="module")
def compiled() -> dict[Variant, dict[str, Resources]]:
    """Everything, on as many processes as there are cores (DYNAPRUNE_TEST_WORKERS sets another number)."""
    workers = int(os.environ.get("DYNAPRUNE_TEST_WORKERS", os.cpu_count() or 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return dict(zip(VARIANTS, pool.map(resources, VARIANTS, chunksize=4), strict=True))


def described(variant: Variant) -> str:
    sizes = f"{variant.block[0]}x{variant.block[1]}" + ("-ragged" if variant.ragged else "")
    return f"{variant.op}-{variant.capability}-{variant.dtype}-{sizes}"


@pytest.mark.parametrize("variant", VARIANTS, ids=described)
def test_fits_the_device(variant: Variant, compiled: dict[Variant, dict[str, Resources]]) -> None:
    for kernel, taken in compiled[variant].items():
        assert (taken.stack_bytes, taken.local_bytes) == (0, 0), f"{kernel} spills: {taken}"
        assert taken.shared_bytes <= shared_limit(variant), f"{kernel}: {taken}"
        if kernel not in WITHOUT_PRODUCT:
            assert taken.instruction == MATRIX_INSTRUCTION[variant.capability], f"{kernel}: {taken}"
            if (variant.dtype, kernel) not in SMALL_COPIES:
                assert taken.bulk_copy or taken.wide_copies, f"{kernel} copies in small pieces: {taken}"


def test_every_kernel_is_compiled(compiled: dict[Variant, dict[str, Resources]]) -> None:
    matrix = {
        "linear_product",
        "linear_wgrad",
        "linear_probe",
        "conv2d_product",
        "conv2d_wgrad",
        "conv2d_probe",
    }
    names = {kernel for kernels in compiled.values() for kernel in kernels}
    assert names == {f"{name}_kernel" for name in matrix} | WITHOUT_PRODUCT


def test_hopper_reads_tiles_with_the_copy_engine(compiled: dict[Variant, dict[str, Resources]]) -> None:
    for op in ("linear_forward", "linear_dgrad"):
        for block in ((64, 64), (128, 128)):
            assert compiled[Variant(op, 90, "bf16", block)]["linear_product_kernel"].bulk_copy
        assert not compiled[Variant(op, 80, "bf16", (64, 64))]["linear_product_kernel"].bulk_copy


def test_the_table_is_what_is_compiled(compiled: dict[Variant, dict[str, Resources]]) -> None:
    version, table = read_table()
    if Version(version) != Version(triton.__version__):
        pytest.skip(f"resources.csv was written with triton {version}, this is {triton.__version__}")
    rows = [row(v, kernel, taken) for v, kernels in compiled.items() for kernel, taken in kernels.items()]
    changed = [(old, new) for old, new in zip(table, rows, strict=False) if old != new]
    assert table == rows, (
        f"{len(table)} rows in the table, {len(rows)} compiled, first differences {changed[:3]}; "
        f"`python -m tests.triton.resources` writes it anew"
    )
