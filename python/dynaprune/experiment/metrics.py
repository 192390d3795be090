"""What an arm measures: quality, step times, memory, FLOPs, and the machine it ran on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaprune.pruning.counted_flops import flops_and_probes, flops_of

__all__ = [
    "environment",
    "flops_and_probes",
    "flops_of",
    "held_bytes",
    "median_seconds",
    "memory_peak_from_now",
    "peak_memory_bytes",
    "prepare_memory_reading",
    "training_state_bytes",
]

STEPS_TIMED = 20


def median_seconds(seconds: list[float]) -> float | None:
    """The median, or None of nothing."""
    return statistics.median(seconds) if seconds else None


def training_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state as they are stored, and their sum under ``total``."""
    weights = gradients = 0
    for parameter in model.parameters():
        weights += parameter.numel() * parameter.element_size()
        if parameter.grad is not None:
            gradients += parameter.grad.numel() * parameter.grad.element_size()
    state = sum(
        value.numel() * value.element_size()
        for entries in optimizer.state.values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    )
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": state,
        "total": weights + gradients + state,
    }


def _status_bytes(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return None


def held_bytes(device: torch.device) -> int | None:
    """Bytes held now: by the CUDA allocator, or the process's resident set where /proc tells it."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status_bytes("VmRSS")


def _peak_resident_bytes() -> int:
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: of the CUDA allocator on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _peak_resident_bytes()


def prepare_memory_reading(device: torch.device) -> bool:
    """Start the peak anew from what is held now; False where the system cannot (then only the whole run's
    peak exists).

    On Linux the allocator's free pages go back to the system first (``malloc_trim``), so that memory the
    training has let go is not counted, and writing 5 to /proc/self/clear_refs resets the peak resident set.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def memory_peak_from_now(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Gives a function that reads the peak since entry in bytes, or None where it cannot be reset."""
    can_reset = prepare_memory_reading(device)
    yield lambda: peak_memory_bytes(device) if can_reset else None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model", "Hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return found.stdout.strip() or None
    return None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads and commit, as they go into ``report.json``."""
    from importlib.metadata import PackageNotFoundError, version

    from dynaprune_kernels.backends import cpu

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("dynaprune", "torch", "numpy", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": cpu.capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": _commit(),
    }
