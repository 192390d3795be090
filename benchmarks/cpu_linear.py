"""Block-sparse linear kernels of the CPU beside the best dense library call, timed in turn in one process.

    python -m benchmarks.cpu_linear --quick
    python -m benchmarks.cpu_linear --shapes 2048x4096x4096 --blocks 16,32x8 --densities 0.1,0.5 --ops forward

A shape is tokens x inputs x outputs. A block is outputs x inputs, or the edge of a square one. The dense
contestants are ``torch.mm`` (both layouts of the weight), ``F.linear`` and oneDNN's 1x1 convolution on
channels-last memory; the ratio is the fastest of them over ours.
Every result is compared with float64 before it is timed. Efficiency is density x dense time / our time: 1 is
a dense kernel that could skip the dead blocks at no cost. With ``--threads 1`` the thread's CPU time is
counted instead of wall time, which is the way to measure on a machine that others use, too.

First the fastest dense contestant of an op is found, then ours and that one are timed in turn, so that a slow
spell of the machine meets both.

Every call allocates its output, and the C library's allocator keeps what is freed (``mallopt``; tcmalloc and
jemalloc, which PyTorch's tuning guide recommends, do so by themselves). By default glibc gives blocks over
32 MiB, and at times smaller ones, back to the system and faults them in anew on every call: about 1.5 us for
each 4 KB page, more than a sparse product of the same memory may take. ``--fresh-memory`` measures with that.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dynaprune_kernels._extension as extension
from benchmarks.block_names import block_named, name_of
from dynaprune_kernels.geometry import Block

OPS = ("forward", "dgrad", "wgrad")
SHAPES = "2048x3072x768,2048x4096x4096"
MORE_SHAPES = "32x1024x1024,128x1024x1024,2048x768x3072"


class Timing(NamedTuple):
    """Milliseconds: median, and the 20% and 80% quantiles."""

    median: float
    low: float
    high: float


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep freed memory for the next call; False with another C library."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def timings(calls: Sequence[Callable[[], object]], least: int, seconds: float) -> list[Timing]:
    """Times ``calls`` in turn, each at least ``least`` times and for about ``seconds``."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while len(taken[0]) < least or time.perf_counter() - begin < seconds * len(calls):
        for call, times in zip(calls, taken, strict=True):
            start = clock()
            call()
            times.append((clock() - start) * 1e3)
    ordered = [sorted(times) for times in taken]
    return [Timing(*(times[int(q * (len(times) - 1))] for q in (0.5, 0.2, 0.8))) for times in ordered]


class Problem:
    """A random block-sparse layer and its dense twin.

    Args:
        tokens, inputs, outputs: sizes; inputs and outputs must be multiples of ``block`` (outputs, inputs).
        density: expected fraction of live blocks.
    """

    def __init__(
        self, tokens: int, inputs: int, outputs: int, block: Block, density: float, dtype: torch.dtype
    ) -> None:
        if inputs % block.inputs or outputs % block.outputs:
            raise ValueError(f"expected sizes divisible by block {name_of(block)}, got {outputs} x {inputs}")
        generator = torch.Generator().manual_seed(0)
        grid = (outputs // block.outputs, inputs // block.inputs)
        self.mask = torch.rand(grid, generator=generator) < density
        self.mask[0, 0] = True
        self.block, self.capacity = block, int(self.mask.sum())
        slots = torch.full(grid, -1, dtype=torch.int32)
        size = 8 + grid[0] + 1 + grid[1] + 1 + 6 * self.capacity + grid[0] + grid[1]
        self.index = torch.zeros(size, dtype=torch.int32)
        one = [1, 1]
        raw = torch.ops.dynaprune_cpu
        raw.layout_update(self.mask, slots, self.index, self.capacity, 1, one, one, one, True)
        self.x = torch.randn(tokens, inputs, generator=generator).to(dtype)
        self.dy = torch.randn(tokens, outputs, generator=generator).to(dtype)
        dense = torch.randn(outputs, inputs, generator=generator).to(dtype)
        self.alive = self.mask.repeat_interleave(block.outputs, 0).repeat_interleave(block.inputs, 1)
        self.weight = dense * self.alive
        self.values = self.live_blocks(self.weight)

    @property
    def density(self) -> float:
        return self.capacity / self.mask.numel()

    def live_blocks(self, dense: Tensor) -> Tensor:
        """Live blocks of ``[outputs, inputs]`` in slot order, here row-major: ``[capacity, bi, bo]``."""
        (bo, bi), (rows, columns) = self.block, self.mask.shape
        blocks = dense.view(rows, bo, columns, bi).permute(0, 2, 3, 1)
        return blocks[self.mask].contiguous()

    def ours(self, op: str) -> Callable[[], Tensor]:
        """The call of one op."""
        raw = torch.ops.dynaprune_cpu
        if op == "forward":
            return lambda: raw.linear_forward(self.x, self.values, None, self.index, self.weight.shape[0])
        if op == "dgrad":
            return lambda: raw.linear_dgrad(self.dy, self.values, self.index, self.weight.shape[1])
        bo, bi = self.block
        return lambda: raw.linear_wgrad(self.dy, self.x, self.index, self.capacity, bi, bo)

    def dense(self, op: str) -> dict[str, Callable[[], Tensor]]:
        """The dense contestants of one op by name."""
        x, dy, weight = self.x, self.dy, self.weight

        def image(t: Tensor) -> Tensor:  # [tokens, channels] as one image of height tokens, without a copy
            return t.t().reshape(1, t.shape[1], t.shape[0], 1).contiguous(memory_format=torch.channels_last)

        kernel = weight.view(*weight.shape, 1, 1)
        x_image, dy_image, transposed = image(x), image(dy), weight.t().contiguous()

        def backward(wanted: list[bool], which: int) -> Tensor:
            return torch.ops.aten.convolution_backward(
                dy_image, x_image, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
            )[which]

        if op == "forward":
            return {
                "F.linear": lambda: F.linear(x, weight),
                "mm": lambda: torch.mm(x, transposed),
                "conv1x1": lambda: F.conv2d(x_image, kernel),
            }
        if op == "dgrad":
            return {"mm": lambda: torch.mm(dy, weight), "conv1x1": lambda: backward([True, False, False], 0)}
        return {
            "mm": lambda: torch.mm(dy.t(), x),
            "mm of transpose": lambda: torch.mm(x.t(), dy),
            "conv1x1": lambda: backward([False, True, False], 1),
        }

    def check(self, op: str) -> None:
        """Compares our result with float64; raises AssertionError where it is off by more than rounding."""
        x, dy, weight = self.x.double(), self.dy.double(), self.weight.double()
        got = self.ours(op)().double()
        if op == "forward":
            exact, scale = x @ weight.t(), x.abs() @ weight.abs().t()
        elif op == "dgrad":
            exact, scale = dy @ weight, dy.abs() @ weight.abs()
        else:
            exact, scale = self.live_blocks(dy.t() @ x), self.live_blocks(dy.t().abs() @ x.abs())
        bound = 4 * torch.finfo(self.x.dtype).eps * scale
        if not bool(((got - exact).abs() <= bound).all()):
            raise AssertionError(f"{op}: wrong by {(got - exact).abs().max().item():.3e}; nothing was timed")


def measure(problem: Problem, op: str, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    problem.check(op)
    contestants = problem.dense(op)
    heats = timings(list(contestants.values()), least=3, seconds=0)
    name = min(zip(contestants, heats, strict=True), key=lambda pair: pair[1].median)[0]
    ours, best = timings([problem.ours(op), contestants[name]], least=11, seconds=seconds)
    tokens, (outputs, inputs) = problem.x.shape[0], problem.weight.shape
    return {
        "op": op,
        "shape": f"{tokens}x{inputs}x{outputs}",
        "dtype": str(problem.x.dtype).removeprefix("torch."),
        "block": name_of(problem.block),
        "density": problem.density,
        "ours_ms": ours.median,
        "ours_ms_20": ours.low,
        "ours_ms_80": ours.high,
        "dense_ms": best.median,
        "dense_ms_20": best.low,
        "dense_ms_80": best.high,
        "dense": name,
        "gflops": 2e-6 * tokens * inputs * outputs * problem.density / ours.median,
        "dense_gflops": 2e-6 * tokens * inputs * outputs / best.median,
        "ratio": best.median / ours.median,
        "efficiency": problem.density * best.median / ours.median,
    }


def table_line(line: dict[str, Any]) -> str:
    """One result for the eye."""
    return (
        "{shape:>15} B{block:<5} d {density:.3f} {op:8}"
        "ours {ours_ms:8.3f} ({ours_ms_20:.3f} .. {ours_ms_80:.3f}) {gflops:5.0f} GFLOP/s  "
        "dense {dense_ms:8.3f} ({dense_ms_20:.3f} .. {dense_ms_80:.3f}) {dense_gflops:5.0f} GFLOP/s "
        "{dense:<15}  ratio {ratio:5.2f}  efficiency {efficiency:.2f}"
    ).format(**line)


def main() -> None:
    """Prints the table, and writes it as JSON lines if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, density 0.1, a second each")
    parser.add_argument("--shapes", help="tokens x inputs x outputs, comma-separated")
    parser.add_argument("--blocks", default="32,64")
    parser.add_argument("--densities", help="comma-separated (default 0.1, and 0.2 and 0.5 without --quick)")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, help="for each call (default 0.5, or 1 without --quick)")
    parser.add_argument("--fresh-memory", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--json", type=Path, help="also write one JSON object a line to this file")
    arguments = parser.parse_args()
    status = extension.load()
    if not status.loaded:
        parser.error(f"nothing to measure: {status.reason}")
    torch.set_num_threads(arguments.threads)
    kept = not arguments.fresh_memory and keep_freed_memory()
    shapes = arguments.shapes or (SHAPES if arguments.quick else f"{SHAPES},{MORE_SHAPES}")
    densities = arguments.densities or ("0.1" if arguments.quick else "0.1,0.2,0.5")
    seconds = arguments.seconds or (0.5 if arguments.quick else 1.0)
    print(f"{torch.ops.dynaprune_cpu.capability()}, {arguments.threads} threads, torch {torch.__version__}")
    print("freed memory is kept" if kept else "the allocator may give freed memory back to the system")
    print(f"median ms (20% .. 80%) of {'CPU' if arguments.threads == 1 else 'wall'} time")
    lines = []
    for shape in shapes.split(","):
        tokens, inputs, outputs = (int(size) for size in shape.split("x"))
        for density in map(float, densities.split(",")):
            for block in map(block_named, arguments.blocks.split(",")):
                problem = Problem(tokens, inputs, outputs, block, density, getattr(torch, arguments.dtype))
                for op in arguments.ops.split(","):
                    line = measure(problem, op, seconds)
                    lines.append(json.dumps(line) + "\n")
                    print(table_line(line), flush=True)
    if arguments.json:
        unfinished = arguments.json.with_suffix(".tmp")
        unfinished.write_text("".join(lines))
        unfinished.replace(arguments.json)


if __name__ == "__main__":
    main()
