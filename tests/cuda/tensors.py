"""The bindings of the CUDA ops over emulated kernels: `torch.ops.dynaprune_cuda_emulated`, on CPU tensors."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from tests.cuda.emulation import ROOT, folder_for

FLAGS = [
    "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DDYN_EMULATION", "-DDYNAPRUNE_SM90A",
    "-DTORCH_TARGET_VERSION=0x020a000000000000", '-DDYNAPRUNE_CUDA_ARCHITECTURES="emulated"',
]  # fmt: skip


def build() -> Path:
    """Compile every binding and every launcher for host threads, once for all processes."""
    csrc = ROOT / "csrc"
    sources = [*sorted(csrc.glob("bindings/cuda_*.cpp")), *sorted(csrc.glob("core/launch/*.cu"))]
    folder = folder_for([*FLAGS, torch.__version__], *(csrc / "bindings").glob("c*"))
    library = folder / "dynaprune_cuda_emulated.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{csrc}", *(f"-isystem{path}" for path in include_paths())]

    def compiled(source: Path) -> str:
        target = folder / f"{source.name}.{os.getpid()}.o"
        run("g++", *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target))
        return str(target)

    with concurrent.futures.ThreadPoolExecutor(
        int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    ) as pool:
        objects = list(pool.map(compiled, sources))
    libraries = [f"-L{path}" for path in library_paths()]
    unfinished = folder / f"{library.name}.{os.getpid()}"
    run("g++", "-shared", *objects, *libraries, "-lc10", "-ltorch_cpu", "-o", str(unfinished))
    unfinished.replace(library)
    for path in objects:
        Path(path).unlink()
    return library


def run(*command: str) -> None:
    """Run a compiler; its messages are the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]


@functools.cache
def load() -> Any:
    """The raw ops."""
    torch.ops.load_library(build())
    return torch.ops.dynaprune_cuda_emulated
