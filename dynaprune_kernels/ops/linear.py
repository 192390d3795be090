"""``block_sparse_linear``: y = x W^T + b over live blocks, dgrad, wgrad, fused saliency, gradient probe."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from dynaprune_kernels.backends.dispatch import select
from dynaprune_kernels.backends.problem import Problem
from dynaprune_kernels.geometry import Block
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
    "block_sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor index, int out_features, "
    "Tensor? tap=None, Tensor? probe=None) -> Tensor"
)
define("block_sparse_linear_dgrad(Tensor dy, Tensor values, Tensor index, int in_features) -> Tensor")
define("block_sparse_linear_wgrad(Tensor dy, Tensor x, Tensor index, SymInt capacity, int[] block) -> Tensor")
define(
    "block_sparse_linear_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index) -> (Tensor, Tensor)"
)
define(
    "linear_gradient_probe(Tensor dy, Tensor x, Tensor index, SymInt capacity, int[] block, Tensor probe) "
    "-> Tensor"
)


def _backend(op: str, x: Tensor, outputs: int, inputs: int, capacity: int, block: Block) -> ModuleType:
    return select(Problem(op, x.dtype, block, x.shape[0], outputs, inputs, capacity), x.device)


def _blocks(dy: Tensor, x: Tensor, block: Sequence[int]) -> int:
    return weight_blocks(dy.shape[1], x.shape[1], block)


@implement("block_sparse_linear")
def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_features: int,
    tap: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    backend = _backend("linear_forward", x, out_features, x.shape[1], values.shape[0], Block.of(values))
    return backend.linear_forward(x, values, bias, index, out_features)


@implement("block_sparse_linear_dgrad")
def _dgrad(dy: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    backend = _backend("linear_dgrad", dy, dy.shape[1], in_features, values.shape[0], Block.of(values))
    return backend.linear_dgrad(dy, values, index, in_features)


@implement("block_sparse_linear_wgrad")
def _wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int]) -> Tensor:
    backend = _backend("linear_wgrad", x, dy.shape[1], x.shape[1], capacity, Block(*block))
    return backend.linear_wgrad(dy, x, index, capacity, Block(*block))


@implement("block_sparse_linear_wgrad_saliency")
def _wgrad_saliency(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    backend = _backend("linear_wgrad", x, dy.shape[1], x.shape[1], values.shape[0], Block.of(values))
    return backend.linear_wgrad_saliency(dy, x, values, index)


@implement("linear_gradient_probe")
def _probe(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int], probe: Tensor) -> Tensor:
    backend = _backend("linear_probe", x, dy.shape[1], x.shape[1], capacity, Block(*block))
    return backend.linear_probe(dy, x, index, capacity, Block(*block), probe)


@fake("block_sparse_linear")
def _(x, values, bias, index, out_features, tap=None, probe=None):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features)


@fake("block_sparse_linear_dgrad")
def _(dy, values, index, in_features):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], in_features)


@fake("block_sparse_linear_wgrad")
def _(dy, x, index, capacity, block):  # type: ignore[no-untyped-def]
    return x.new_empty(capacity, block[1], block[0])


@fake("block_sparse_linear_wgrad_saliency")
def _(dy, x, values, index):  # type: ignore[no-untyped-def]
    blocks = _blocks(dy, x, Block.of(values))
    return values.new_empty(values.shape), values.new_empty(blocks, dtype=accumulator(values.dtype))


@fake("linear_gradient_probe")
def _(dy, x, index, capacity, block, probe):  # type: ignore[no-untyped-def]
    return x.new_empty(_blocks(dy, x, block), dtype=accumulator(x.dtype))


# The three matrix ops are one closed algebra: each one's gradients are the other two.


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, index, _, tap, probe = inputs
    check_tap(tap, x)
    ctx.save_for_backward(x, values, index, probe if tap is not None else None)
    ctx.tap_rows = 0 if tap is None else tap.shape[0]


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, index, probe = ctx.saved_tensors
    dx = dw = db = dtap = None
    if ctx.needs_input_grad[0]:
        dx = OPS.block_sparse_linear_dgrad(dy, values, index, x.shape[1])
    if ctx.tap_rows and ctx.needs_input_grad[5]:
        dw, signed = OPS.block_sparse_linear_wgrad_saliency(dy, x, values, index)
        probed, block = None, Block.of(values)
        if probe is not None:
            probed = OPS.linear_gradient_probe(dy, x, index, values.shape[0], block, probe)
        dtap = tap_gradient(signed, probed, *input_rows(ctx.tap_rows, x, dy.shape[1], block, None, probe))
    elif ctx.needs_input_grad[1]:
        dw = OPS.block_sparse_linear_wgrad(dy, x, index, values.shape[0], Block.of(values))
    if ctx.needs_input_grad[2]:
        db = dy.sum(0)
    return dx, dw, db, None, None, dtap, None


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, values, index = ctx.saved_tensors
    ddy = dw = None
    if ctx.needs_input_grad[0]:
        ddy = OPS.block_sparse_linear(ddx, values, None, index, dy.shape[1])
    if ctx.needs_input_grad[1]:
        dw = OPS.block_sparse_linear_wgrad(dy, ddx, index, values.shape[0], Block.of(values))
    return ddy, dw, None, None


def _wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _wgrad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    dy, x, index = ctx.saved_tensors
    ddw = ddw.contiguous()
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        with of_directions():
            ddy = OPS.block_sparse_linear(x, ddw, None, index, dy.shape[1])
    if ctx.needs_input_grad[1]:
        dx = OPS.block_sparse_linear_dgrad(dy, ddw, index, x.shape[1])
    return ddy, dx, None, None, None


autograd("block_sparse_linear", _forward_backward, _forward_setup)
autograd("block_sparse_linear_dgrad", _dgrad_backward, _dgrad_setup)
autograd("block_sparse_linear_wgrad", _wgrad_backward, _wgrad_setup)
no_autograd("block_sparse_linear_wgrad_saliency")
no_autograd("linear_gradient_probe")

flops(
    OPS.block_sparse_linear,
    lambda x, values, bias, index, *_, **__: live_flops(index, Block.of(values), x.shape[0]),
)
flops(
    OPS.block_sparse_linear_dgrad,
    lambda dy, values, index, *_, **__: live_flops(index, Block.of(values), dy.shape[0]),
)
flops(
    OPS.block_sparse_linear_wgrad,
    lambda dy, x, index, capacity, block, *_, **__: live_flops(index, block, dy.shape[0]),
)
flops(
    OPS.block_sparse_linear_wgrad_saliency,
    lambda dy, x, values, index, *_, **__: live_flops(index, Block.of(values), dy.shape[0]),
)
flops(
    OPS.linear_gradient_probe,
    lambda dy, x, index, capacity, block, probe, **__: probe_flops(
        _blocks(dy, x, block), index, block, dy.shape[0], probe
    ),
)
