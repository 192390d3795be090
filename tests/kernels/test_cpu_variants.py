"""Run-time dispatch: every instruction set of this machine gives right results, and none leaks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynaprune_kernels._extension as extension

STATUS = extension.load()
pytestmark = pytest.mark.skipif(not STATUS.loaded, reason=str(STATUS.reason))

ROOT = Path(__file__).resolve().parent.parent.parent
LEVELS = ["neon"] if platform.machine() == "aarch64" else ["generic", "avx2", "avx512"]


def run_python(code: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DYNAPRUNE_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("capability", LEVELS)
def test_each_variant_agrees_with_dense(capability: str) -> None:
    available = LEVELS[: LEVELS.index(torch.ops.dynaprune_cpu.capability()) + 1]
    if capability not in available:
        pytest.skip(f"this CPU has no {capability}")
    code = f"""
import itertools, torch
import tests.kernels.test_cpu_linear as t
assert t.ops.capability() == {capability!r}
for (m, inputs, out, bi, bo), dtype in itertools.product(t.SHAPES, t.FLOATS):
    t.check_layer(t.make_layer(m, inputs, out, bi, bo, 0.5, dtype))
for dtype in t.FLOATS:
    t.test_block_saliency(5, 19, dtype)
    t.test_block_saliency(32, 32, dtype)
    t.test_bitwise_equal_for_any_number_of_threads(40, dtype)
"""
    result = run_python(code, capability)
    assert result.returncode == 0, result.stderr


def test_an_unknown_capability_is_refused_by_name() -> None:
    code = (
        "import torch, dynaprune_kernels._extension as extension\n"
        "extension.load()\n"
        "torch.ops.dynaprune_cpu.capability()"
    )
    result = run_python(code, "avx1024")
    assert result.returncode != 0
    assert "expected one of" in result.stderr
    assert "got avx1024" in result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has variants with other encodings")
@pytest.mark.parametrize("variant", ["avx512", "avx2"])
def test_no_weak_function_carries_a_variant_s_encoding(variant: str, tmp_path: Path) -> None:
    """A weak function of such an object could be the copy that the linker keeps for every CPU.

    Compiled without optimisation, which inlines nothing away that could come out weak.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    source = ROOT / "csrc" / "cpu" / f"kernels_{variant}.cpp"
    made = tmp_path / "variant.o"
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(made)], check=True)
    symbols = subprocess.run(["nm", "-C", str(made)], check=True, capture_output=True, text=True).stdout
    defined = re.findall(r"^[0-9a-f]+ ([TWVuDBR]) (.*)$", symbols, re.MULTILINE)
    assert defined
    code = [name for kind_, name in defined if kind_ in "TWVu" and not name.startswith("DW.ref.")]
    assert code == []
