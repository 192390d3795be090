"""Problems for the kernel benchmarks and the tuner, and the calls that solve them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry, reference
from dynaprune_kernels.backends.pointwise import convolutions
from dynaprune_kernels.backends.problem import Problem

Call = Callable[[], Tensor]


class Case(NamedTuple):
    """One op at one size.

    Attributes:
        op: ``linear_forward``, ``conv2d_wgrad``, ...
        batch: tokens or images.
        out, inputs: features or channels.
        block: outputs and inputs per block, equal.
        conv, size: of a convolution, with the height and width of its input.
    """

    op: str
    batch: int
    out: int
    inputs: int
    block: int
    density: float
    dtype: torch.dtype
    conv: ConvGeometry | None = None
    size: tuple[int, int] = (1, 1)

    @property
    def shape(self) -> str:
        """A short name of the sizes."""
        if self.conv is None:
            return f"{self.batch}x{self.out}x{self.inputs}"
        kernel = f"{self.conv.kernel_h}x{self.conv.kernel_w}s{self.conv.stride_h}"
        return f"{self.batch}x{self.inputs}x{self.size[0]}x{self.size[1]}-{self.out}x{kernel}"


class Operands(NamedTuple):
    """Tensors of a case; ``dense`` is the weight with zeros where no block lives."""

    layout: BlockLayout
    x: Tensor
    dy: Tensor
    values: Tensor
    dense: Tensor


def build(case: Case, device: str, seed: int = 0) -> Operands:
    """Random operands; the mask is the same number of random blocks for every seed."""
    generator = torch.Generator().manual_seed(seed)
    layout = BlockLayout(case.out, case.inputs, case.block, conv=case.conv)
    live = max(round(case.density * layout.blocks), 1)
    mask = torch.zeros(layout.blocks, dtype=torch.bool)
    mask[torch.randperm(layout.blocks, generator=generator)[:live]] = True
    layout = BlockLayout(
        case.out, case.inputs, case.block, conv=case.conv, mask=mask.view_as(layout.mask), capacity=live
    ).to(device)

    on_device = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=on_device, device=device).to(case.dtype)

    values = normal(live, case.block, case.block)
    if case.conv is None:
        x, dy = normal(case.batch, case.inputs), normal(case.batch, case.out)
    else:
        x = normal(case.batch, case.inputs, *case.size).contiguous(memory_format=torch.channels_last)
        dy = normal(case.batch, case.out, *case.conv.output_size(*case.size))
        dy = dy.contiguous(memory_format=torch.channels_last)
    groups = 1 if case.conv is None else case.conv.groups
    dense = reference.dense_weight(values, layout.index, case.out, case.inputs // groups, case.conv)
    if case.conv is not None:
        dense = dense.contiguous(memory_format=torch.channels_last)
    return Operands(layout, x, dy, values, dense)


def problem_of(case: Case, operands: Operands) -> Problem:
    """The same problem as dispatch and the launchers see it."""
    first = operands.dy if case.op.endswith("dgrad") else operands.x
    tokens = first.shape[0] if case.conv is None else first.shape[0] * first.shape[2] * first.shape[3]
    inputs = case.inputs if case.conv is None else case.inputs // case.conv.groups * case.conv.taps
    op = case.op
    if case.conv is not None and case.conv.pointwise:
        op = op.replace("conv2d", "linear")
    return Problem(op, case.dtype, operands.layout.block, tokens, case.out, inputs, operands.layout.capacity)


def flops(case: Case, operands: Operands) -> int:
    """Of the live blocks, a multiply-add counted as two."""
    tokens = case.batch
    if case.conv is not None:
        height, width = case.conv.output_size(*case.size)
        tokens *= height * width
    return 2 * operands.layout.capacity * case.block**2 * tokens


def call(case: Case, operands: Operands, backend: ModuleType) -> Call:
    """The op on one of our backends (``backends.triton``, ``backends.cpu``, ``reference``)."""
    layout, x, dy, values, _ = operands
    block = (case.block, case.block)
    conv = () if case.conv is None else (case.conv,)
    function = getattr(convolutions(backend, case.conv, x, dy) if case.conv else backend, case.op)
    if case.op.endswith("forward"):
        return lambda: function(x, values, None, layout.index, case.out, *conv)
    if case.op.endswith("dgrad"):
        size = case.inputs if case.conv is None else list(x.shape)
        return lambda: function(dy, values, layout.index, size, *conv)
    if case.op.endswith("wgrad"):
        return lambda: function(dy, x, layout.index, layout.capacity, block, *conv)
    flag = torch.tensor(True, device=x.device)
    return lambda: function(dy, x, layout.index, layout.capacity, block, *conv, flag)


def dense_call(case: Case, operands: Operands) -> Call:
    """The vendor's dense op on a weight that is dense to begin with: the time to beat."""
    _, x, dy, _, weight = operands
    if case.conv is None:
        if case.op.endswith("forward"):
            return lambda: F.linear(x, weight)
        if case.op.endswith("dgrad"):
            return lambda: dy @ weight
        return lambda: dy.t() @ x
    conv = case.conv
    if case.op.endswith("forward"):
        return lambda: F.conv2d(x, weight, None, conv[2:4], conv[4:6], conv[6:8], conv.groups)
    wgrad = not case.op.endswith("dgrad")

    def backward() -> Tensor:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, conv[2:4], conv[4:6], conv[6:8], False, [0, 0], conv.groups,
            [not wgrad, wgrad, False],
        )  # fmt: skip
        return dw if wgrad else dx

    return backward


def dense_result(case: Case, operands: Operands, result: Tensor) -> Tensor:
    """A dense op's result in the form of ours: wgrad's blocks by slot, the probe's norms."""
    if case.op.endswith(("forward", "dgrad")):
        return result
    layout = operands.layout
    blocks = reference.dense_to_blocks(result, (case.block, case.block), case.conv)
    if case.op.endswith("wgrad"):
        return blocks[layout.block_of_slot.long()]
    return blocks.float().square().sum((1, 2)).masked_fill(layout.mask.flatten(), 0)


def wrong(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with a result, None if nothing is.

    Compares the root mean square of the error with that of the result. Allowed are two roundings of a 16-bit
    dtype, or of TF32 for float32 on a GPU, and else what other orders of long float32 sums differ by; one
    missing block of n would show as 1 / sqrt(n).
    """
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    eps = torch.finfo(dtype).eps
    allowed = 2 * eps if dtype.itemsize == 2 else 2 * 2.0**-10 if actual.is_cuda else 256 * eps
    ratio = float(error / size) if float(size) else float(error)
    return None if ratio <= allowed else f"relative error {ratio:.2g} (allowed {allowed:.2g})"
