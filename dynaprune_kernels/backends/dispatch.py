"""Which backend runs an op, and why the others do not.

``DYNAPRUNE_BACKEND`` = ``cpu`` | ``triton`` | ``cuda`` | ``dense`` | ``reference`` forces one and fails with
the reason where it cannot run.
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
from dynaprune_kernels.backends import cpu, cuda, triton
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton import config, support

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
    "dense": reference,
    "reference": reference,
}

# Share of the dense weight that the capacity holds, above which a GPU without a table of measurements takes
# the vendor's library on the materialised weight; by the smaller size of a block. An estimate, which no GPU
# has confirmed, from the bytes that an H200 can bring from L2 to a tile.
_GPU_CROSSOVER = {16: 0.12, 32: 0.22, 64: 0.4, 128: 0.6}

# Share of the dense weight above which the CPU takes the vendor's library for blocks of 8, half an AVX-512
# vector, from _CPU_MANY_TOKENS on. Measured on 2 cores, torch 2.13: dense and ours break even at these
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
_CPU_MANY_TOKENS = 256


class Choice(NamedTuple):
    """A backend's name, and why it is the one."""

    backend: str
    reason: str


def why_not(backend: str, problem: Problem, device_type: str, capability: int | None = None) -> str | None:
    """The reason why ``backend`` cannot run ``problem`` on this kind of device, None if it can.

    Args:
        capability: of a GPU, 10 x major + minor; None where it is not known.

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
    if backend == "cuda":
        return cuda.why_not(op, device_type, capability, dtype, problem.block)
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
    return BACKENDS[choose(problem, device.type, *device_facts(device), forced).backend]


@functools.cache
def device_facts(device: torch.device) -> tuple[str, int | None]:
    """A GPU's name and compute capability, 10 x major + minor; nothing of a CPU."""
    if device.type != "cuda":
        return "", None
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), 10 * major + minor


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
    problem: Problem,
    device_type: str,
    device_name: str = "",
    capability: int | None = None,
    forced: str = "auto",
) -> Choice:
    """The backend that :func:`select` takes, with the reason."""
    if forced != "auto":
        reason = why_not(forced, problem, device_type, capability)
        if reason is not None:
            raise RuntimeError(f"DYNAPRUNE_BACKEND={forced} cannot run {problem.op}: {reason}")
        return Choice(forced, f"DYNAPRUNE_BACKEND={forced}")
    against = {
        name: why_not(name, problem, device_type, capability)
        for name in _candidates(problem, device_type, capability)
    }
    able = [name for name, reason in against.items() if reason is None]
    if not able:
        reason = "; ".join(str(reason) for reason in against.values())
        _say_once(device_type, reason)
        return Choice("dense", reason)
    if problem.tokens == 0 or problem.block is None:
        return Choice(able[0], f"{problem.op} does the same work whatever the density{_order(able)}")
    if device_type == "cuda":
        return _faster_on_gpu(problem, device_name, able)
    return _faster_on_cpu(problem)


def _candidates(problem: Problem, device_type: str, capability: int | None) -> tuple[str, ...]:
    """The sparse backends, that first which comes first where nothing is measured.

    An estimate as well: on Hopper, in 16 bits and blocks of 64 or more, tiles of ``cuda`` do 85 FLOP per byte
    from L2, those of Triton 64, and its convolutions gather by pointers.
    """
    if device_type != "cuda":
        return ("cpu",)
    wide = problem.block is not None and min(problem.block) >= 64
    if capability == 90 and wide and problem.dtype in (torch.float16, torch.bfloat16):
        return ("cuda", "triton")
    return ("triton", "cuda")


def _order(able: list[str]) -> str:
    """Why the first of several is taken where nothing is measured."""
    return f"; {able[0]} comes before {' and '.join(able[1:])} unmeasured" if able[1:] else ""


def _faster_on_cpu(problem: Problem) -> Choice:
    assert problem.block is not None
    crossover = _CPU_CROSSOVER.get(problem.op, 1.0)
    half_vector = min(problem.block) <= 8 and cpu.capability() == "avx512"
    if (
        half_vector
        and problem.dtype != torch.float64
        and problem.tokens >= _CPU_MANY_TOKENS
        and problem.density > crossover
    ):
        reason = f"blocks of 8 fill half an AVX-512 vector: {problem.op} is dense above density {crossover}"
        _say_once("cpu", reason)
        return Choice("dense", reason)
    return Choice("cpu", "measured faster than the materialised weight, and level with it at density 1")


def _faster_on_gpu(problem: Problem, device_name: str, able: list[str]) -> Choice:
    times = config.measured(problem, device_name)
    times = {name: time for name, time in times.items() if name in (*able, "dense")}
    if times.keys() - {"dense"}:
        compared = ", ".join(f"{name} {time:.4g} ms" for name, time in times.items())
        return Choice(min(times, key=times.__getitem__), f"measured on {device_name}: {compared}")
    first = able[0]
    if problem.op.endswith("probe"):
        reason = "skips live blocks, and all work while its flag is down; dense does neither"
        return Choice(first, f"{reason}{_order(able)}")
    assert problem.block is not None
    crossover = _GPU_CROSSOVER[min(problem.block)]
    unmeasured = (
        f"{device_name} has no measurement of {config.key(problem)} (`python -m benchmarks.tune_triton`)"
    )
    if problem.density > crossover:
        return Choice("dense", f"capacity {problem.density:.2f} is above {crossover}; {unmeasured}")
    reason = f"capacity {problem.density:.2f} is at most {crossover}; {unmeasured}{_order(able)}"
    return Choice(first, reason)
