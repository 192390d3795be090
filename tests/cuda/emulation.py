"""Builds the emulation's Python modules with g++, and runs tests inside a sanitized Python."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("address,undefined", "thread")
CHOSEN = "DYN_EMULATION_SANITIZER"  # the environment variable that names a test process's own sanitizer


def reason_against() -> str | None:
    """Why nothing can be emulated here; None where it can."""
    if sys.platform != "linux":
        return "the emulation needs Linux (futex)"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def _require() -> None:
    reason = reason_against()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


def folder_for(flags: list[str], *more: Path) -> Path:
    """Where modules lie that are made with these flags from csrc as it is now, and from ``more``."""
    _require()
    digest = hashlib.sha256("\0".join([*flags, sys.version]).encode())
    digest.update(subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout)
    for folder in ("csrc/core", "csrc/emulation"):
        more += tuple(path for path in (ROOT / folder).rglob("*") if path.is_file())
    for path in sorted([*more, ROOT / "csrc/layout_view.h"]):
        digest.update(path.name.encode() + path.read_bytes())
    user = Path(tempfile.gettempdir()) / f"dynaprune-emulation-{os.getuid()}"
    return user / digest.hexdigest()[:16]


def build(op: str, sanitizer: str = "") -> Path:
    """Compile ``csrc/emulation/<op>_module.cpp`` into a module ``emulated_<op>``, once for all processes."""
    _require()
    import pybind11

    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-DDYN_EMULATION", *([f"-fsanitize={sanitizer}"] if sanitizer else [])]
    if "undefined" in sanitizer:
        flags += ["-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    folder = folder_for(flags)
    module = folder / f"emulated_{op}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = module.with_suffix(f".{os.getpid()}")
    command = ["g++", *flags, "-o", str(unfinished), str(ROOT / "csrc" / "emulation" / f"{op}_module.cpp")]
    command += [f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}"]
    command += [f"-isystem{sysconfig.get_path('include')}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    unfinished.replace(module)
    return module


@functools.cache
def load(op: str) -> ModuleType:
    """The emulated launchers of one .cu file, built with this process's own sanitizer."""
    path = build(op, os.environ.get(CHOSEN, ""))
    spec = importlib.util.spec_from_file_location(f"emulated_{op}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _runtime_library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_sanitized(
    sanitizer: str, *pytest_arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run pytest in a Python with the sanitizer's runtime; its reports are in ``stdout``."""
    libraries = ["libtsan.so"] if sanitizer == "thread" else ["libasan.so", "libubsan.so"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=no"]
    # Only the conftest.py of this folder: torch must stay out of a process under ThreadSanitizer.
    command += ["--confcutdir", str(ROOT / "tests" / "cuda"), *pytest_arguments]
    if shutil.which("setarch"):  # ThreadSanitizer's shadow memory needs addresses without much randomness
        command = ["setarch", platform.machine(), "-R", *command]
    settings = {
        **os.environ,
        CHOSEN: sanitizer,
        "LD_PRELOAD": " ".join(_runtime_library(name) for name in [*libraries, "libstdc++.so"]),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "history_size=4",
        "OPENBLAS_NUM_THREADS": "1",
        **(environment or {}),
    }
    return subprocess.run(
        command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, rounded to nearest even, as the emulation takes it: uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` as "float32", "float16" or "bfloat16" (its bits)."""
    return bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)


def as_float64(values: np.ndarray) -> np.ndarray:
    """The numbers that an array of :func:`as_dtype` stands for."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)
