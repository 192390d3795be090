"""What setup.py makes of the CUDA part: on a tree with its build files and the smallest sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.resources import NVCC
from tests.packaging.test_abi import foreign, undefined_symbols

pytestmark = [pytest.mark.gpu_offline, pytest.mark.slow]

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = {
    "layout_view.h": "",
    "bindings/library.cpp": """
#include <torch/csrc/stable/library.h>
#include <string>
std::string capability() { return "none"; }
STABLE_TORCH_LIBRARY(dynaprune_cpu, m) { m.def("capability() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dynaprune_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&capability));
}
""",
    "core/launchers.h": "#include <cuda_runtime_api.h>\ncudaError_t fill(float* y);\n",
    "core/launch/fill.cu": """
#include "core/launchers.h"
__global__ void fill_kernel(float* y) { *y = 1; }
cudaError_t fill(float* y) { fill_kernel<<<1, 1>>>(y); return cudaGetLastError(); }
""",
    "core/launch/only_sm90.cu": """
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error compiled for another architecture
#endif
__global__ void only_sm90_kernel(float* y) { *y = 2; }
void only_sm90(float* y) { only_sm90_kernel<<<1, 1>>>(y); }
""",
    "bindings/cuda_library.cpp": """
#include <torch/csrc/stable/library.h>
#include <string>
#include "core/launchers.h"
std::string architectures() { return fill(nullptr) == cudaSuccess ? "" : DYNAPRUNE_CUDA_ARCHITECTURES; }
STABLE_TORCH_LIBRARY(dynaprune_cuda, m) { m.def("architectures() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dynaprune_cuda, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&architectures));
}
""",
}


# What alone keeps the CUDA part out here, and the reason that is given for it.
WITHOUT_CUDA = (
    ({}, "has no CUDA (FORCE_CUDA=1 builds them all the same)")
    if torch.version.cuda is None
    else ({"CUDA_HOME": "/nowhere"}, "looked for /nowhere/bin/nvcc")
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tree that setup.py can build in seconds."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(_ROOT / name, tmp_path)
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    shutil.copytree(_ROOT / "dynaprune_kernels", tmp_path / "dynaprune_kernels", ignore=built)
    for name, text in _SOURCES.items():
        file = tmp_path / "csrc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def build(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build in place; of the build's own variables only those given are set."""
    own = (
        "CUDA_HOME",
        "CUDA_PATH",
        "FORCE_CUDA",
        "DYNAPRUNE_NO_CUDA",
        "DYNAPRUNE_NO_EXT",
        "TORCH_CUDA_ARCH_LIST",
    )
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=checkout,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


def facts(checkout: Path) -> dict[str, Any]:
    """What the build recorded of the CUDA part."""
    return json.loads((checkout / "dynaprune_kernels" / "_build.json").read_text())["cuda"]


def load(checkout: Path) -> str:
    """What a fresh interpreter says after loading the CUDA part."""
    code = (
        "import torch; from dynaprune_kernels import _extension as e, info; status = e.load_cuda(); "
        "print(status.reason or torch.ops.dynaprune_cuda.architectures()); info.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout), "DYNAPRUNE_DISABLE_EXT": "0", "COLUMNS": "300"}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_with_nvcc_it_is_built_and_loads_without_a_driver(checkout: Path) -> None:
    finished = build(checkout, FORCE_CUDA="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert facts(checkout)["architectures"] == ["8.0", "9.0a"]
    assert (checkout / "dynaprune_kernels" / "_C.abi3.so").is_file()
    library = checkout / "dynaprune_kernels" / "_C_cuda.abi3.so"
    assert foreign(undefined_symbols(library)) == []
    printed = load(checkout)
    assert printed.startswith("8.0 9.0a\n")
    assert "cuda architectures" in printed
    # Nothing changed, nothing is compiled; another list of architectures is.
    assert "nvcc" not in build(checkout, FORCE_CUDA="1").stdout
    finished = build(checkout, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="7.5 8.6+PTX")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "7.5 is left out" in finished.stdout
    assert "only_sm90" not in finished.stdout
    assert load(checkout).startswith("8.6+PTX\n")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        WITHOUT_CUDA,
        ({"DYNAPRUNE_NO_CUDA": "1"}, "DYNAPRUNE_NO_CUDA was set"),
    ],
)
def test_without_cuda_the_rest_is_built_and_says_why(
    checkout: Path, variables: dict[str, str], reason: str
) -> None:
    finished = build(checkout, **variables)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"installing without the CUDA kernels: {facts(checkout)['reason']}" in finished.stdout
    assert facts(checkout)["extension"] is False and reason in facts(checkout)["reason"]
    assert [file.name for file in (checkout / "dynaprune_kernels").glob("*.so")] == ["_C.abi3.so"]
    assert reason in load(checkout)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"CUDA_HOME": "/nowhere", "FORCE_CUDA": "1"},
            "FORCE_CUDA is set, but the CUDA kernels cannot be built",
        ),
        (
            {"DYNAPRUNE_NO_EXT": "1", "FORCE_CUDA": "1"},
            "FORCE_CUDA is set, but the CUDA kernels cannot be built",
        ),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper", "FORCE_CUDA": "1"}, "expected TORCH_CUDA_ARCH_LIST like"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0 7.5", "FORCE_CUDA": "1"}, "expected an architecture from 8.0 on"),
    ],
)
def test_what_cannot_be_built_as_asked_is_an_error(
    checkout: Path, variables: dict[str, str], message: str
) -> None:
    if "TORCH_CUDA_ARCH_LIST" in variables and NVCC is None:
        pytest.skip("nvcc is not installed")
    finished = build(checkout, **variables)
    assert finished.returncode != 0
    assert message in finished.stderr
