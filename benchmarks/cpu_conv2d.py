"""Block-sparse convolutions on the CPU beside the best dense ones.

Run ``python -m benchmarks.cpu_conv2d --quick``.

Dense is torch's convolution (oneDNN) in channels-last and in contiguous memory, whichever has the lower
median. All candidates of a layer and op take turns within each round, so that a busy machine hits them
alike. Results are checked against float64 before anything is timed. ``of ideal`` is density x dense time /
time: 1.0 would be a kernel that is as good as the dense one and skips every dead block. ``--threads 1``
counts the thread's CPU time instead of wall time, which is the way to measure on a machine that others use,
too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.block_names import block_named, name_of
from dynaprune_kernels import _extension, reference
from dynaprune_kernels.geometry import Block, ConvGeometry, conv_grid
from dynaprune_kernels.index import column_lists, index_size


class Layer(NamedTuple):
    """A convolution with square kernel and images; padding keeps the size at stride 1."""

    name: str
    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1

    @property
    def conv(self) -> ConvGeometry:
        k, s, p = self.kernel, self.stride, self.kernel // 2
        return ConvGeometry(k, k, s, s, p, p)


RESNET18 = [
    Layer("stage1", 64, 64, 32),
    Layer("stage2", 128, 128, 16),
    Layer("stage3", 256, 256, 8),
    Layer("stage4", 512, 512, 4),
    Layer("1->2 /2", 64, 128, 32, stride=2),
    Layer("2->3 /2", 128, 256, 16, stride=2),
    Layer("3->4 /2", 256, 512, 8, stride=2),
    Layer("1->2 1x1 /2", 64, 128, 32, kernel=1, stride=2),
    Layer("3->4 1x1 /2", 256, 512, 8, kernel=1, stride=2),
    Layer("1x1", 256, 256, 8, kernel=1),
]
HALF_WIDTH = [
    Layer("half stage1", 32, 32, 32),
    Layer("half stage2", 64, 64, 16),
    Layer("half stage3", 128, 128, 8),
    Layer("half stage4", 256, 256, 4),
]
OPS = ("forward", "dgrad", "wgrad")


class Sparse(NamedTuple):
    """A layer's random live blocks: `density` is the live share, `dense` the masked weight in float64."""

    block: Block
    density: float
    values: Tensor
    packed: Tensor
    dense: Tensor
    slots: Tensor


def make_sparse(layer: Layer, block: Block, density: float, dtype: torch.dtype) -> Sparse:
    rows, columns = conv_grid(layer.outputs, layer.inputs, block, layer.conv)
    live = max(1, round(density * rows * columns))
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[torch.randperm(rows * columns)[:live]] = True
    mask = mask.view(rows, columns)
    slots = torch.full((rows, columns), -1, dtype=torch.int32)
    index = torch.zeros(index_size(rows, column_lists(columns, layer.conv), live), dtype=torch.int32)
    reference.layout_update(mask, slots, index, live, layer.conv, release=False)
    values = torch.randn(live, block.inputs, block.outputs).to(dtype)
    dense = reference.dense_weight(values.double(), index, layer.outputs, layer.inputs, layer.conv)
    return Sparse(block, live / (rows * columns), values, index, dense, slots)


def sparse_call(layer: Layer, sparse: Sparse, op: str, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    ops, conv, (bo, bi) = torch.ops.dynaprune_cpu, list(layer.conv), sparse.block
    if op == "forward":
        return lambda: ops.conv2d_forward(x, sparse.values, None, sparse.packed, layer.outputs, conv)
    if op == "dgrad":
        return lambda: ops.conv2d_dgrad(dy, sparse.values, sparse.packed, list(x.shape), conv)
    capacity = sparse.values.shape[0]
    return lambda: ops.conv2d_wgrad(dy, x, sparse.packed, capacity, bi, bo, conv)


def dense_call(layer: Layer, op: str, x: Tensor, dy: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    conv = layer.conv
    stride, padding = list(conv[2:4]), list(conv[4:6])
    if op == "forward":
        return lambda: F.conv2d(x, weight, None, stride, padding)
    wanted = [op == "dgrad", op == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
    )[OPS.index(op) - 1]


def check(layer: Layer, sparse: Sparse, op: str, x: Tensor, dy: Tensor) -> None:
    """Raises RuntimeError where the kernel's result is not the dense one's, up to rounding."""
    ours = sparse_call(layer, sparse, op, x, dy)().double()
    exact, scale = (
        dense_call(layer, op, f(x.double()), f(dy.double()), f(sparse.dense))()
        for f in (torch.Tensor.double, torch.abs)
    )
    if op == "wgrad":
        live = sparse.slots.flatten() >= 0
        order = sparse.slots.flatten()[live].long()
        by_slot = order.argsort()
        exact, scale = (
            reference.dense_to_blocks(g, sparse.block, layer.conv)[live][by_slot] for g in (exact, scale)
        )
    worst = ((ours - exact).abs() / scale.clamp(min=1e-30)).max().item() / torch.finfo(x.dtype).eps
    if not worst <= 16:
        raise RuntimeError(
            f"{layer.name} {op}, block {name_of(sparse.block)}: wrong by {worst:.1f} eps of |x||W|"
        )


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(len(times) - 1, int(q * len(times)))]


def spread(times: list[float]) -> str:
    """Median with the 20% and 80% quantiles, in milliseconds."""
    low, middle, high = (1e3 * quantile(times, q) for q in (0.2, 0.5, 0.8))
    return f"{middle:7.2f} ms [{low:.2f}, {high:.2f}]"


def run_layer(
    layer: Layer, batch: int, blocks: list[Block], densities: list[float], dtype: torch.dtype, seconds: float
) -> None:
    """Prints the times of one layer's three ops; each op is measured for about ``seconds``."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    x = torch.randn(batch, layer.inputs, layer.size, layer.size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel).to(dtype)
    y = F.conv2d(x, weight, None, layer.stride, layer.kernel // 2)
    dy = torch.randn_like(y).contiguous(memory_format=torch.channels_last)
    sparse = [make_sparse(layer, block, density, dtype) for block in blocks for density in densities]
    flops = 2 * y.numel() * layer.inputs * layer.kernel**2
    for op in OPS:
        for s in sparse:
            check(layer, s, op, x[:2], dy[:2])
        calls = [
            dense_call(layer, op, *(t.contiguous(memory_format=layout) for t in (x, dy, weight)))
            for layout in (torch.channels_last, torch.contiguous_format)
        ]
        calls += [sparse_call(layer, s, op, x, dy) for s in sparse]
        times: list[list[float]] = [[] for _ in calls]
        for call in calls:
            call()
        end = clock() + seconds
        while clock() < end or len(times[0]) < 5:
            for call, taken in zip(calls, times, strict=True):
                start = clock()
                call()
                taken.append(clock() - start)
        dense = min(times[:2], key=lambda taken: quantile(taken, 0.5))
        name = "channels-last" if dense is times[0] else "contiguous"
        middle = quantile(dense, 0.5)
        print(f"{layer.name:12s} {op:8s} dense ({name}) {spread(dense)} {flops / middle / 1e9:5.0f} GFLOP/s")
        for s, taken in zip(sparse, times[2:], strict=True):
            faster, best = middle / quantile(taken, 0.5), min(dense) / min(taken)
            print(
                f"{'':21s} block {name_of(s.block):>5s} density {s.density:4.2f}  {spread(taken)}  "
                f"{faster:5.2f}x dense  {s.density * faster:4.2f} of ideal "
                f"({s.density * best:4.2f} by best times)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer layers and densities, shorter")
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--blocks", type=block_named, nargs="+", default=[Block(16, 16), Block(32, 32)])
    parser.add_argument("--densities", type=float, nargs="+")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, help="time spent on one op of one layer")
    options = parser.parse_args()
    status = _extension.load()
    if not status.loaded:
        raise SystemExit(f"no CPU kernels to measure: {status.reason}")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    densities = options.densities or ([0.1, 0.5] if options.quick else [0.05, 0.1, 0.2, 0.5, 1.0])
    layers = RESNET18[:5] if options.quick and not options.layers else RESNET18 + HALF_WIDTH
    seconds = options.seconds or (0.4 if options.quick else 1.5)
    print(
        f"torch {torch.__version__}, {options.threads} threads, batch {options.batch}, {options.dtype}, "
        f"kernels for {torch.ops.dynaprune_cpu.capability()}; median [20%, 80%]"
    )
    for layer in layers:
        if options.layers in layer.name:
            run_layer(layer, options.batch, options.blocks, densities, getattr(torch, options.dtype), seconds)


if __name__ == "__main__":
    main()
