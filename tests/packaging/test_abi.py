"""The compiled extension depends on torch's stable C interface and the C and C++ run-time libraries only."""

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


@pytest.fixture(scope="module")
def undefined() -> list[str]:
    """The undefined symbols of the extension as `nm` prints them, weak ones left out."""
    path = _extension.find()
    if path is None:
        pytest.skip(f"no compiled extension: {_extension.load().reason}")
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    return _undefined_symbols(path)


def _undefined_symbols(path: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    return [line.split()[-1] for line in listing.stdout.splitlines() if not _WEAK.match(line)]


def _foreign(symbols: list[str]) -> list[str]:
    """The symbols that are neither torch's stable interface nor versioned run-time symbols."""

    def known(symbol: str) -> bool:
        name, _, version = symbol.partition("@")
        runtime = version.lstrip("@").split("_")[0] in _RUNTIME_VERSIONS
        return name.startswith(("aoti_torch_", "torch_")) or runtime or _STANDARD.match(name) is not None

    return [symbol for symbol in symbols if not known(symbol)]


def test_only_stable_torch_symbols(undefined: list[str]) -> None:
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in undefined)
    assert _foreign(undefined) == []


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
    assert _foreign([*unstable, *stable]) == unstable


def test_file_carries_the_stable_python_tag() -> None:
    path = _extension.find()
    if path is None:
        pytest.skip(f"no compiled extension: {_extension.load().reason}")
    assert path.name == "_C.abi3.so"


def test_exports_no_kernel_symbols() -> None:
    """Everything of ours is hidden, so that two libraries with the same names never meet."""
    path = _extension.find()
    if path is None or shutil.which("nm") is None:
        pytest.skip("needs the compiled extension and nm (binutils)")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", "-C", path], capture_output=True, text=True, check=True
    )
    assert [line for line in listing.stdout.splitlines() if "dynaprune" in line.lower()] == []
