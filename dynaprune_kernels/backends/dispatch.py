"""Which backend runs an op, and why the others do not.

``DYNAPRUNE_BACKEND`` = ``cpu`` | ``dense`` | ``reference`` forces one and fails with the reason where it
cannot run.
Otherwise the choice depends on the op, the dtype, the number of rows and the *capacity* of the layer, all
known to the host: it never syncs and never differs between two runs.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch

from dynaprune_kernels import _extension, reference
from dynaprune_kernels.backends import cpu

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "dense": reference, "reference": reference}

# Share of the dense weight that the capacity holds, above which materialising it and calling the vendor's
# library is faster on a CPU; by op and least number of rows.
_CPU_CROSSOVER: dict[str, tuple[tuple[int, float], ...]] = {}


def why_not(backend: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The reason why ``backend`` cannot run ``op`` on this device and dtype, None if it can.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected DYNAPRUNE_BACKEND to be one of {', '.join(BACKENDS)}, got {backend!r}")
    if BACKENDS[backend] is reference:
        return None
    if device_type != "cpu":
        return f"the cpu backend runs on CPU tensors, got {device_type}"
    if not _extension.load().loaded:
        return _extension.load().reason
    if op != "layout_update" and dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"the cpu kernels take float32, bfloat16 and float64, got {dtype}"
    return None


def select(op: str, device_type: str, dtype: torch.dtype, rows: int = 0, density: float = 0.0) -> ModuleType:
    """The backend module for one call.

    Args:
        op: a function name of the backend modules, such as ``linear_forward``.
        rows: tokens, or batch x height x width.
        density: share of the dense weight that the layer's capacity holds.

    Raises:
        RuntimeError: the forced backend cannot run here, with the reason.
    """
    return BACKENDS[
        choose(op, device_type, dtype, rows, density, os.environ.get("DYNAPRUNE_BACKEND", "auto"))
    ]


def _say_once(device_type: str, reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"block-sparse ops on {device_type} run on the dense backend, which saves no time: {reason} "
            f"(`python -m dynaprune_kernels.info` lists the backends)",
            RuntimeWarning,
            stacklevel=4,
        )


_said: set[str] = set()


@functools.lru_cache(maxsize=4096)
def choose(
    op: str, device_type: str, dtype: torch.dtype, rows: int, density: float, forced: str = "auto"
) -> str:
    """Name of the backend that :func:`select` takes."""
    if forced != "auto":
        reason = why_not(forced, op, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"DYNAPRUNE_BACKEND={forced} cannot run {op}: {reason}")
        return forced
    reason = why_not("cpu", op, device_type, dtype)
    if reason is not None:
        _say_once(device_type, reason)
        return "dense"
    for least_rows, crossover in _CPU_CROSSOVER.get(op, ()):
        if rows >= least_rows and density > crossover:
            return "dense"
    return "cpu"
