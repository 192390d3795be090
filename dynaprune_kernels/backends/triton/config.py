"""Tile sizes: measured ones from a table per device, else a default that fits the device.

A table is ``configs/<device name>.json``, written by ``python -m benchmarks.tune_triton``::

    {"device": "...", "triton": "3.6.0", "torch": "2.11.0",
     "entries": {"linear_forward/bfloat16/64x64/t8192/o4096/i4096/c25":
                 {"tile": {"tokens": 256, "depth": 64, "warps": 8, "stages": 5, "tma": true},
                  "milliseconds": 0.1, "cuda_milliseconds": 0.1, "dense_milliseconds": 0.3}}}

The key holds what the host knows: op, dtype, block, tokens (or pixels), outputs and inputs (of one group,
times taps) rounded up to powers of two, and the *capacity* in percent of the dense weight, one of
:data:`CAPACITY_BUCKETS`. A choice therefore neither syncs nor goes stale in a captured graph.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.backends.triton.launch import Device
from dynaprune_kernels.geometry import Block

FOLDER = Path(__file__).parent / "configs"
CAPACITY_BUCKETS = (3, 5, 10, 15, 25, 35, 50, 70, 100)


class Tile(NamedTuple):
    """One configuration.

    Attributes:
        tokens: or pixels, per output tile; for wgrad and probe, per step of the sum.
        depth: elements summed per step; for wgrad and probe, inputs per tile. A multiple or a divisor of the
            block: small blocks are merged, large ones take several steps.
        tma: load through tensor descriptors where the operands allow it (from Hopper on).
    """

    tokens: int
    depth: int
    warps: int
    stages: int
    tma: bool = False


def next_power_of_two(n: int) -> int:
    """Smallest power of two >= max(n, 1)."""
    return 1 << (max(n, 1) - 1).bit_length()


def block_of(problem: Problem) -> Block:
    """The block of a problem that has one."""
    if problem.block is None:
        raise ValueError(f"expected a problem with a block, got {problem}")
    return problem.block


def key(problem: Problem) -> str:
    """The problem's bucket in a table."""
    bo, bi = block_of(problem)
    bucket = next((b for b in CAPACITY_BUCKETS if 100 * problem.density <= b), CAPACITY_BUCKETS[-1])
    dtype = str(problem.dtype).removeprefix("torch.")
    sizes = [next_power_of_two(n) for n in (problem.tokens, problem.outputs, problem.inputs)]
    return f"{problem.op}/{dtype}/{bo}x{bi}/t{sizes[0]}/o{sizes[1]}/i{sizes[2]}/c{bucket}"


def file_of(device_name: str) -> Path:
    """The table of a device."""
    return FOLDER / (re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower() + ".json")


@functools.cache
def table(device_name: str) -> dict[str, Any]:
    """The measured entries of a device by key; empty without a table."""
    path = file_of(device_name)
    if not path.is_file():
        return {}
    entries: dict[str, Any] = json.loads(path.read_text())["entries"]
    return entries


def measured(problem: Problem, device_name: str) -> dict[str, float]:
    """Milliseconds by backend in the problem's bucket: the tuned kernel, cuda where it was there, dense."""
    entry = table(device_name).get(key(problem), {})
    columns = {
        "triton": "milliseconds",
        "cuda": "cuda_milliseconds",
        "dense": "dense_milliseconds",
    }
    return {backend: entry[column] for backend, column in columns.items() if column in entry}


_forced: list[Tile] = []


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Launch with ``tile`` inside, whatever the problem: for tuning and tests."""
    _forced.append(tile)
    try:
        yield
    finally:
        _forced.pop()


def tile(problem: Problem, device: Device) -> Tile:
    """The configuration to launch with: measured for the problem's bucket, else the default."""
    return _forced[-1] if _forced else _chosen(problem, device)


@functools.lru_cache(maxsize=4096)
def _chosen(problem: Problem, device: Device) -> Tile:
    entry = table(device.name).get(key(problem))
    return Tile(**entry["tile"]) if entry else default_tile(problem, device)


def buffers(problem: Problem, tile: Tile, device: Device) -> int:
    """Steps whose operands lie in shared memory at once.

    Loads through an index share the stages with the loads of the index; from Hopper on, asynchronous
    products hold on to one more. Read off what Triton 3.9 compiles.
    """
    if is_wgrad(problem.op):
        return tile.stages - (0 if device.capability >= 90 else 1)
    return (tile.stages - 1) // 2 + (1 if device.capability >= 90 else 0)


def shared_bytes(problem: Problem, tile: Tile, device: Device) -> int:
    """Shared memory of the pipelined operand tiles."""
    held = buffers(problem, tile, device) * problem.dtype.itemsize
    bo, bi = block_of(problem)
    if is_wgrad(problem.op):
        outer = max(bo, 64) if problem.op.endswith("probe") else bo
        return held * tile.tokens * (tile.depth + outer)
    outer = bi if problem.op.endswith("dgrad") else bo
    return held * tile.depth * (tile.tokens + outer)


def is_wgrad(op: str) -> bool:
    """Whether the sum runs over tokens."""
    return op.endswith(("wgrad", "probe"))


def default_tile(problem: Problem, device: Device) -> Tile:
    """A sound configuration for a device without a table; it fits the device's shared memory."""
    wide = problem.dtype.itemsize == 4
    hopper = device.capability >= 90
    bo, bi = block_of(problem)
    tokens = max(next_power_of_two(problem.tokens), 16)
    if is_wgrad(problem.op):
        probe = problem.op.endswith("probe")
        width = max(bi, 64 if wide or probe or bo > 64 else 128)
        outer = max(bo, 64) if probe else bo
        warps = 8 if width * outer >= (64 if wide else 128) * 128 else 4
        tile = Tile(min(32 if wide else 64, tokens), width, warps, 3 if wide else 4, hopper and not wide)
    else:
        outer = bi if problem.op.endswith("dgrad") else bo
        widest = (128 if outer <= 64 else 64) if wide else (256 if outer <= 64 and hopper else 128)
        tokens = min(widest, tokens)
        crowded = wide or (
            problem.op.startswith("conv2d") and not hopper
        )  # 4 warps would run out of registers
        warps = 8 if tokens * outer >= (64 if crowded else 128) * 128 or tokens >= 256 else 4
        tile = Tile(tokens, 32 if wide else 64, warps, 5 if hopper else 7, hopper)
    return fitting(problem, tile, device)


def fitting(problem: Problem, tile: Tile, device: Device) -> Tile:
    """``tile``, with fewer stages and then fewer tokens until it fits the device's shared memory.

    At least three stages stay: with fewer, loads through an index are not pipelined.
    """
    while shared_bytes(problem, tile, device) > device.shared_bytes and tile.stages > 3:
        tile = tile._replace(stages=tile.stages - 1)
    while shared_bytes(problem, tile, device) > device.shared_bytes and tile.tokens > 16:
        tile = tile._replace(tokens=tile.tokens // 2)
    return tile


def splits(programs: int, steps: int, device: Device) -> int:
    """How many parts a sum over ``steps`` steps is cut into, so that few programs still fill the device.

    Depends on nothing that changes between runs on one device, and neither do the results.
    """
    wanted = -(-2 * device.processors // max(programs, 1))
    return max(1, min(wanted, steps // 4, 16))
