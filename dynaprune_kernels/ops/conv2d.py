"""``block_sparse_conv2d``: 2-D convolution over live blocks, dgrad, wgrad, fused saliency, gradient probe."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from dynaprune_kernels.backends.dispatch import select
from dynaprune_kernels.backends.pointwise import OverPixels, convolutions
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.geometry import Block, ConvGeometry
from dynaprune_kernels.memory_format import new_image, suggests_channels_last
from dynaprune_kernels.ops.inputs import input_rows
from dynaprune_kernels.ops.registration import (
    OPS,
    accumulator,
    autograd,
    check_tap,
    define,
    fake,
    flops,
    implement,
    live_flops,
    no_autograd,
    probe_flops,
    tap_gradient,
    weight_blocks,
)
from dynaprune_kernels.ops.transforms import of_directions

define(
    "block_sparse_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor index, int out_channels, int[] conv, "
    "Tensor? tap=None, Tensor? probe=None, bool channels_last=True) -> Tensor"
)
define(
    "block_sparse_conv2d_dgrad(Tensor dy, Tensor values, Tensor index, SymInt[] input_size, int[] conv, "
    "bool channels_last=True) -> Tensor"
)
define(
    "block_sparse_conv2d_wgrad(Tensor dy, Tensor x, Tensor index, SymInt capacity, int[] block, int[] conv) "
    "-> Tensor"
)
define(
    "block_sparse_conv2d_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index, int[] conv) "
    "-> (Tensor, Tensor)"
)
define(
    "conv2d_gradient_probe(Tensor dy, Tensor x, Tensor index, SymInt capacity, int[] block, int[] conv, "
    "Tensor probe) "
    "-> Tensor"
)


def _backend(
    op: str,
    images: tuple[Tensor, ...],
    outputs: int,
    channels: int,
    capacity: int,
    block: Block,
    conv: ConvGeometry,
    channels_last: bool = True,
) -> ModuleType | OverPixels:
    if conv.pointwise:
        op = op.replace("conv2d", "linear")
    inputs, x = channels // conv.groups * conv.taps, images[0]
    problem = Problem(op, x.dtype, block, _tokens(x), outputs, inputs, capacity)
    return convolutions(select(problem, x.device), conv, *images, channels_last=channels_last)


def _blocks(dy: Tensor, x: Tensor, block: Sequence[int], conv: list[int]) -> int:
    return weight_blocks(dy.shape[1], x.shape[1] // conv[8], block, conv[0] * conv[1])


def _tokens(image: Tensor) -> int:
    return int(image.shape[0] * image.shape[2] * image.shape[3])


@implement("block_sparse_conv2d")
def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_channels: int,
    conv: list[int],
    tap: Tensor | None = None,
    probe: Tensor | None = None,
    channels_last: bool = True,
) -> Tensor:
    geometry = ConvGeometry(*conv)
    backend = _backend(
        "conv2d_forward",
        (x,),
        out_channels,
        x.shape[1],
        values.shape[0],
        Block.of(values),
        geometry,
        channels_last,
    )
    return backend.conv2d_forward(x, values, bias, index, out_channels, geometry, channels_last)


@implement("block_sparse_conv2d_dgrad")
def _dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_size: list[int],
    conv: list[int],
    channels_last: bool = True,
) -> Tensor:
    geometry = ConvGeometry(*conv)
    backend = _backend(
        "conv2d_dgrad",
        (dy,),
        dy.shape[1],
        input_size[1],
        values.shape[0],
        Block.of(values),
        geometry,
        channels_last,
    )
    return backend.conv2d_dgrad(dy, values, index, input_size, geometry, channels_last)


@implement("block_sparse_conv2d_wgrad")
def _wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int], conv: list[int]) -> Tensor:
    geometry = ConvGeometry(*conv)
    backend = _backend("conv2d_wgrad", (x, dy), dy.shape[1], x.shape[1], capacity, Block(*block), geometry)
    return backend.conv2d_wgrad(dy, x, index, capacity, Block(*block), geometry)


@implement("block_sparse_conv2d_wgrad_saliency")
def _wgrad_saliency(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: list[int]
) -> tuple[Tensor, Tensor]:
    geometry = ConvGeometry(*conv)
    backend = _backend(
        "conv2d_wgrad", (x, dy), dy.shape[1], x.shape[1], values.shape[0], Block.of(values), geometry
    )
    return backend.conv2d_wgrad_saliency(dy, x, values, index, geometry)


@implement("conv2d_gradient_probe")
def _probe(
    dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int], conv: list[int], probe: Tensor
) -> Tensor:
    geometry = ConvGeometry(*conv)
    backend = _backend("conv2d_probe", (x, dy), dy.shape[1], x.shape[1], capacity, Block(*block), geometry)
    return backend.conv2d_probe(dy, x, index, capacity, Block(*block), geometry, probe)


@fake("block_sparse_conv2d")
def _(  # type: ignore[no-untyped-def]
    x, values, bias, index, out_channels, conv, tap=None, probe=None, channels_last=True
):
    size = (x.shape[0], out_channels, *ConvGeometry(*conv).output_size(*x.shape[2:]))
    return new_image(x, size, channels_last)


@fake("block_sparse_conv2d_dgrad")
def _(dy, values, index, input_size, conv, channels_last=True):  # type: ignore[no-untyped-def]
    return new_image(dy, input_size, channels_last)


@fake("block_sparse_conv2d_wgrad")
def _(dy, x, index, capacity, block, conv):  # type: ignore[no-untyped-def]
    return x.new_empty(capacity, block[1], block[0])


@fake("block_sparse_conv2d_wgrad_saliency")
def _(dy, x, values, index, conv):  # type: ignore[no-untyped-def]
    blocks = _blocks(dy, x, Block.of(values), conv)
    return values.new_empty(values.shape), values.new_empty(blocks, dtype=accumulator(values.dtype))


@fake("conv2d_gradient_probe")
def _(dy, x, index, capacity, block, conv, probe):  # type: ignore[no-untyped-def]
    return x.new_empty(_blocks(dy, x, block, conv), dtype=accumulator(x.dtype))


# The three matrix ops are one closed algebra: each one's gradients are the other two.


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, index, _, conv, tap, probe, channels_last = inputs
    check_tap(tap, x)
    ctx.save_for_backward(x, values, index, probe if tap is not None else None)
    ctx.tap_rows = 0 if tap is None else tap.shape[0]
    ctx.conv, ctx.channels_last = conv, channels_last


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, index, probe = ctx.saved_tensors
    dx = dw = db = dtap = None
    if ctx.needs_input_grad[0]:
        dx = OPS.block_sparse_conv2d_dgrad(dy, values, index, x.shape, ctx.conv, ctx.channels_last)
    if ctx.tap_rows and ctx.needs_input_grad[6]:
        dw, signed = OPS.block_sparse_conv2d_wgrad_saliency(dy, x, values, index, ctx.conv)
        probed, block = None, Block.of(values)
        if probe is not None:
            probed = OPS.conv2d_gradient_probe(dy, x, index, values.shape[0], block, ctx.conv, probe)
        dtap = tap_gradient(signed, probed, *input_rows(ctx.tap_rows, x, dy.shape[1], block, ctx.conv, probe))
    elif ctx.needs_input_grad[1]:
        dw = OPS.block_sparse_conv2d_wgrad(dy, x, index, values.shape[0], Block.of(values), ctx.conv)
    if ctx.needs_input_grad[2]:
        db = dy.sum((0, 2, 3))
    return dx, dw, db, None, None, None, dtap, None, None


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.conv, ctx.channels_last = inputs[4:]


def _dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, values, index = ctx.saved_tensors
    ddy = dw = None
    if ctx.needs_input_grad[0]:
        ddy = OPS.block_sparse_conv2d(
            ddx, values, None, index, dy.shape[1], ctx.conv, None, None, ctx.channels_last
        )
    if ctx.needs_input_grad[1]:
        dw = OPS.block_sparse_conv2d_wgrad(dy, ddx, index, values.shape[0], Block.of(values), ctx.conv)
    return ddy, dw, None, None, None, None


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.conv = inputs[5]


def _wgrad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    dy, x, index = ctx.saved_tensors
    ddw = ddw.contiguous()
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        with of_directions():
            ddy = OPS.block_sparse_conv2d(
                x, ddw, None, index, dy.shape[1], ctx.conv, None, None, suggests_channels_last(dy)
            )
    if ctx.needs_input_grad[1]:
        dx = OPS.block_sparse_conv2d_dgrad(dy, ddw, index, x.shape, ctx.conv, suggests_channels_last(x))
    return ddy, dx, None, None, None, None


autograd("block_sparse_conv2d", _forward_backward, _forward_setup)
autograd("block_sparse_conv2d_dgrad", _dgrad_backward, _dgrad_setup)
autograd("block_sparse_conv2d_wgrad", _wgrad_backward, _wgrad_setup)
no_autograd("block_sparse_conv2d_wgrad_saliency")
no_autograd("conv2d_gradient_probe")

flops(
    OPS.block_sparse_conv2d,
    lambda x, values, bias, index, *_, out_val, **__: live_flops(index, Block.of(values), _tokens(out_val)),
)
flops(
    OPS.block_sparse_conv2d_dgrad,
    lambda dy, values, index, *_, **__: live_flops(index, Block.of(values), _tokens(dy)),
)
flops(
    OPS.block_sparse_conv2d_wgrad,
    lambda dy, x, index, capacity, block, *_, **__: live_flops(index, block, _tokens(dy)),
)
flops(
    OPS.block_sparse_conv2d_wgrad_saliency,
    lambda dy, x, values, index, *_, **__: live_flops(index, Block.of(values), _tokens(dy)),
)
flops(
    OPS.conv2d_gradient_probe,
    lambda dy, x, index, capacity, block, conv, probe, **__: probe_flops(
        _blocks(dy, x, block, conv), index, block, _tokens(dy), probe
    ),
)
