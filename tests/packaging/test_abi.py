"""The compiled extensions depend on torch's stable C interface and the C and C++ run-time libraries only."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dynaprune_kernels import _extension

_RUNTIME_VERSIONS = ("GLIBC", "GLIBCXX", "CXXABI", "GCC", "OMP", "GOMP")
# libtorch re-exports a few members of the C++ standard library, and the linker then leaves their version out.
_STANDARD = re.compile(r"^_Z(N?K?S[tabsiod]|T[ISV]N?S)(?!.*(3c10|2at\d|5torch))")
_WEAK = re.compile(r"^\s*[wv] ")


@pytest.fixture(scope="module", params=["_C", "_C_cuda"])
def library(request: pytest.FixtureRequest) -> Path:
    """A compiled extension's file."""
    path = _extension.find(request.param)
    if path is None:
        status = _extension.load() if request.param == "_C" else _extension.load_cuda()
        pytest.skip(f"no compiled extension: {status.reason}")
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    return path


def undefined_symbols(path: Path) -> list[str]:
    """The undefined symbols of a library as `nm` prints them, weak ones left out."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    return [line.split()[-1] for line in listing.stdout.splitlines() if not _WEAK.match(line)]


def foreign(symbols: list[str]) -> list[str]:
    """The symbols that are neither torch's stable interface nor versioned run-time symbols."""

    def known(symbol: str) -> bool:
        name, _, version = symbol.partition("@")
        runtime = version.lstrip("@").split("_")[0] in _RUNTIME_VERSIONS
        return name.startswith(("aoti_torch_", "torch_")) or runtime or _STANDARD.match(name) is not None

    return [symbol for symbol in symbols if not known(symbol)]


def test_only_stable_torch_symbols(library: Path) -> None:
    undefined = undefined_symbols(library)
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in undefined)
    assert foreign(undefined) == []


def test_audit_sees_unstable_symbols() -> None:
    unstable = [
        "_ZN3c105ErrorC1ENS_14SourceLocationESs",
        "_ZN2at4_ops5empty4callEv",
        "_ZNSt6vectorIN3c106SymIntESaIS1_EE9push_backEOS1_",
        "PyList_New",
    ]
    stable = [
        "aoti_torch_empty_strided",
        "memcpy@GLIBC_2.14",
        "_Znwm@GLIBCXX_3.4",
        "_ZNSt13runtime_errorC1EPKc",
    ]
    assert foreign([*unstable, *stable]) == unstable


def test_file_carries_the_stable_python_tag(library: Path) -> None:
    assert library.name in ("_C.abi3.so", "_C_cuda.abi3.so")


def test_exports_no_kernel_symbols(library: Path) -> None:
    """Everything of ours is hidden, and so is the CUDA runtime: two copies of one name never meet."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", "-C", library], capture_output=True, text=True, check=True
    )
    assert [line for line in listing.stdout.splitlines() if re.search("dynaprune|cuda", line.lower())] == []


def test_the_stream_of_a_torch_with_cuda_is_found_through_libtorch() -> None:
    """The one weak symbol of torch: libtorch needs libtorch_cuda where there is one, so it must be kept."""
    path = _extension.find("_C_cuda")
    if path is None or shutil.which("readelf") is None:
        pytest.skip("needs the CUDA part and readelf (binutils)")
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in dynamic
    assert "[libtorch_cuda.so]" not in dynamic and "[libcudart" not in dynamic and "[libcuda." not in dynamic
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bw aoti_torch_get_current_cuda_stream\b", symbols)
