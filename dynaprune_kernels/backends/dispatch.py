"""Which backend runs an op, and why the others do not.

``DYNAPRUNE_BACKEND`` = ``cpu`` | ``triton`` | ``dense`` | ``reference`` forces one and fails with the reason
where it cannot run.
Otherwise the choice depends on a :class:`~dynaprune_kernels.backends.problem.Problem` and the device, both
known to the host: it never syncs, never differs between two runs and changes only at a compaction.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from dynaprune_kernels import _extension, reference
from dynaprune_kernels.backends import cpu, triton
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config, support

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "dense": reference, "reference": reference}

# Share of the dense weight that the capacity holds, above which a GPU without a table of measurements takes
# the vendor's library on the materialised weight; by the smaller size of a block. An assumption, not a
# measurement: it lies above the densities at which the kernels of PyTorch's BSR and of stk were published to
# break even (0.4 at 64, 0.1 at 32, 0.01 at 16; 0.98 at 128), since these merge small blocks.
_GPU_CROSSOVER = {16: 0.25, 32: 0.5, 64: 0.7, 128: 0.95}

# Share of the dense weight above which the CPU takes the vendor's library for blocks of 8, half an AVX-512
# vector, from _CPU_MANY_ROWS rows on. Measured on 2 cores, torch 2.13: dense and ours break even at these
# densities. Wider blocks were 1.1 to 18 times as fast as the materialised weight at density 0.6 and 0.8, 0.7
# to 6.9 times at 1.
_CPU_CROSSOVER = {
    "linear_forward": 0.3,
    "linear_dgrad": 0.3,
    "linear_wgrad": 0.3,
    "conv2d_forward": 0.15,
    "conv2d_dgrad": 0.15,
    "conv2d_wgrad": 0.45,
}
_CPU_MANY_ROWS = 256


class Choice(NamedTuple):
    """A backend's name, and why it is the one."""

    backend: str
    reason: str


def why_not(backend: str, problem: Problem, device_type: str) -> str | None:
    """The reason why ``backend`` cannot run ``problem`` on this kind of device, None if it can.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected DYNAPRUNE_BACKEND to be one of {', '.join(BACKENDS)}, got {backend!r}")
    if BACKENDS[backend] is reference:
        return None
    op, dtype = problem.op, problem.dtype
    if backend == "triton":
        return support.why_not(op, device_type, dtype, problem.block)
    if device_type != "cpu":
        return f"the cpu backend runs on CPU tensors, got {device_type}"
    if not _extension.load().loaded:
        return _extension.load().reason
    if op != "layout_update" and dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"the cpu kernels take float32, bfloat16 and float64, got {dtype}"
    return None


def select(problem: Problem, device: torch.device) -> ModuleType:
    """The backend module for one call on tensors of ``device``.

    Raises:
        RuntimeError: the forced backend cannot run here, with the reason.
    """
    forced = os.environ.get("DYNAPRUNE_BACKEND", "auto")
    return BACKENDS[choose(problem, device.type, _device_name(device), forced).backend]


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


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
def choose(problem: Problem, device_type: str, device_name: str = "", forced: str = "auto") -> Choice:
    """The backend that :func:`select` takes, with the reason."""
    if forced != "auto":
        reason = why_not(forced, problem, device_type)
        if reason is not None:
            raise RuntimeError(f"DYNAPRUNE_BACKEND={forced} cannot run {problem.op}: {reason}")
        return Choice(forced, f"DYNAPRUNE_BACKEND={forced}")
    sparse = "triton" if device_type == "cuda" else "cpu"
    reason = why_not(sparse, problem, device_type)
    if reason is not None:
        _say_once(device_type, reason)
        return Choice("dense", reason)
    if problem.rows == 0 or problem.block is None:
        return Choice(sparse, f"{problem.op} does the same work whatever the density")
    if sparse == "triton":
        return _faster_on_gpu(problem, device_name)
    return _faster_on_cpu(problem)


def _faster_on_cpu(problem: Problem) -> Choice:
    assert problem.block is not None
    crossover = _CPU_CROSSOVER.get(problem.op, 1.0)
    half_vector = min(problem.block) <= 8 and torch.ops.dynaprune_cpu.capability() == "avx512"
    if (
        half_vector
        and problem.dtype != torch.float64
        and problem.rows >= _CPU_MANY_ROWS
        and problem.density > crossover
    ):
        reason = f"blocks of 8 fill half an AVX-512 vector: {problem.op} is dense above density {crossover}"
        _say_once("cpu", reason)
        return Choice("dense", reason)
    return Choice("cpu", "measured faster than the materialised weight, and level with it at density 1")


def _faster_on_gpu(problem: Problem, device_name: str) -> Choice:
    measured = config.measured(problem, device_name)
    if measured is not None:
        ours, dense = measured
        backend = "triton" if ours <= dense else "dense"
        return Choice(backend, f"measured on {device_name}: triton {ours:.4g} ms, dense {dense:.4g} ms")
    if problem.op.endswith("probe"):
        return Choice("triton", "skips live blocks, and all work while its flag is down; dense does neither")
    assert problem.block is not None
    crossover = _GPU_CROSSOVER[min(problem.block)]
    unmeasured = (
        f"{device_name} has no measurement of {config.key(problem)} (`python -m benchmarks.tune_triton`)"
    )
    if problem.density > crossover:
        return Choice("dense", f"capacity {problem.density:.2f} is above {crossover}; {unmeasured}")
    return Choice("triton", f"capacity {problem.density:.2f} is at most {crossover}; {unmeasured}")
