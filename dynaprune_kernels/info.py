"""`python -m dynaprune_kernels.info`: versions, the compiled extensions, the backends that run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from dynaprune_kernels import _extension
from dynaprune_kernels.backends import cpu, cuda
from dynaprune_kernels.backends.triton import support

_PACKAGES = ("dynaprune", "torch", "triton", "numpy", "safetensors")
_SWITCHES = ("DYNAPRUNE_DISABLE_EXT", "DYNAPRUNE_CPU_CAPABILITY", "DYNAPRUNE_BACKEND", "OMP_NUM_THREADS")


def _version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any] | None:
    """Name and compute capability of the current GPU, or None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "count": torch.cuda.device_count(),
    }


def _against_gpu() -> str | None:
    """Why nothing runs on a GPU here; None where torch sees one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def _against_cuda() -> str | None:
    """Why the CUDA kernels cannot run on the current GPU; None where they can."""
    reason = _extension.load_cuda().reason or _against_gpu()
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability()
    return cuda.why_not("layout_update", "cuda", 10 * major + minor, torch.int32)


def backends() -> dict[str, str | None]:
    """Every backend with the reason why it does not run here, None where it runs."""
    return {
        "cpu": _extension.load().reason,
        "triton": support.against_installed() or _against_gpu(),
        "cuda": _against_cuda(),
        "dense": None,
        "reference": None,
    }


_CPU_SOURCES = ("*.h", "cpu/*", "bindings/[!c]*", "bindings/c[!u]*")  # of bindings all but cuda_*
_CUDA_SOURCES = ("*.h", "core/**/*.[ch]*", "bindings/cuda_*", "bindings/checks.h")


def _stale(path: Path | None, sources: tuple[str, ...]) -> bool:
    """Whether this is a checkout with sources in csrc that are newer than a compiled extension."""
    if path is None:
        return False
    built = path.stat().st_mtime
    csrc = path.parent.parent / "csrc"
    return any(file.stat().st_mtime > built for pattern in sources for file in csrc.glob(pattern))


def info() -> dict[str, Any]:
    """Everything a bug report needs to tell.

    Returns:
        A dict of plain values: `versions` (distribution -> version or None), `python`, `platform`, `threads`,
        `environment` (the set switches), `gpu` (None or a dict), `extension` (path, reason, stale,
        capability, build), `cuda_extension` (path, reason, stale, architectures) and `backends` (name -> None
        where it runs, else the reason).
    """
    status = _extension.load()
    of_cuda = _extension.load_cuda()
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in _SWITCHES if name in os.environ},
        "gpu": _gpu(),
        "extension": {
            "path": str(status.path) if status.path else None,
            "reason": status.reason,
            "stale": _stale(status.path, _CPU_SOURCES),
            "capability": cpu.capability(),
            "build": _extension.build_facts(),
        },
        "cuda_extension": {
            "path": str(of_cuda.path) if of_cuda.path else None,
            "reason": of_cuda.reason,
            "stale": _stale(of_cuda.path, _CUDA_SOURCES),
            "architectures": list(cuda.architectures()) if of_cuda.loaded else [],
        },
        "backends": backends(),
    }


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """`facts` as rows of a name and a text."""
    extension, of_cuda = facts["extension"], facts["cuda_extension"]
    build = extension["build"]
    rows = [(name, version or "not installed") for name, version in facts["versions"].items()]
    rows += [
        ("python", facts["python"]),
        ("platform", facts["platform"]),
        ("threads", str(facts["threads"])),
        (
            "gpu",
            "none"
            if facts["gpu"] is None
            else "{name}, compute capability {capability}, {count} of them".format(**facts["gpu"]),
        ),
        ("extension", extension["path"] or "none"),
    ]
    outdated = ("", "older than the sources in csrc/: run `make ext`")
    if extension["stale"]:
        rows.append(outdated)
    if build.get("extension"):
        rows.append(("built with", f"torch {build['torch']}, {build['compiler']}"))
        rows.append(("flags", " ".join(build["flags"])))
    if extension["capability"]:
        rows.append(("cpu capability", extension["capability"]))
    rows.append(("cuda extension", of_cuda["path"] or f"none: {of_cuda['reason']}"))
    if of_cuda["stale"]:
        rows.append(outdated)
    if build.get("cuda", {}).get("extension"):
        rows.append(("built with", build["cuda"]["compiler"]))
        rows.append(("flags", " ".join(build["cuda"]["flags"])))
    if of_cuda["architectures"]:
        rows.append(("cuda architectures", " ".join(of_cuda["architectures"])))
    rows += list(facts["environment"].items())
    return rows


def main() -> int:
    """Prints `info()`, as tables where rich is installed; returns the exit status 0."""
    facts = info()
    rows = _lines(facts)
    verdicts = [(name, "no" if reason else "yes", reason or "") for name, reason in facts["backends"].items()]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        for name, text in rows:
            print(f"{name:24} {text}")
        for name, verdict, reason in verdicts:
            print(f"backend {name:16} {verdict:4}{reason}")
        return 0
    console = Console(soft_wrap=False)
    about = Table(show_header=False, box=None)
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for name, text in rows:
        about.add_row(name, text)
    console.print(about)
    table = Table("backend", "runs here", "why not")
    for row in verdicts:
        table.add_row(*row)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
