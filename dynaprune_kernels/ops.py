"""Every op of the namespace ``dynaprune::``: schema, dispatch to a backend, fake, autograd and FLOP formula.

The schemas are defined here and not in C++, so that the same ops exist without the compiled extension. ``index`` is
the packed index of a :class:`~dynaprune_kernels.layout.BlockLayout`; ``conv`` are the nine ints of a
:class:`~dynaprune_kernels.geometry.ConvGeometry`; ``block`` is ``(bi, bo)``, the last two sizes of ``values``.

``tap`` is a float ``[2, rows * columns]`` leaf whose *gradient* carries what only backward can see: row 0 the signed
sum of weight x gradient of each live block, row 1 the squared norm of the dense gradient at each block that is not
live, the latter only while the bool tensor ``probe`` is true.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynaprune_kernels.backends.dispatch import select
from dynaprune_kernels.geometry import ConvGeometry, ceil_div
from dynaprune_kernels.index import N_LIVE

_LIBRARY = torch.library.Library("dynaprune", "DEF")

_SCHEMAS = (
    "block_sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor index, int out_features, "
    "Tensor? tap=None, Tensor? probe=None) -> Tensor",
    "block_sparse_linear_dgrad(Tensor dy, Tensor values, Tensor index, int in_features) -> Tensor",
    "block_sparse_linear_wgrad(Tensor dy, Tensor x, Tensor index, int capacity, int[] block) -> Tensor",
    "block_sparse_linear_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index) -> (Tensor, Tensor)",
    "linear_gradient_probe(Tensor dy, Tensor x, Tensor index, int capacity, int[] block, Tensor probe) -> Tensor",
    "block_sparse_conv2d(Tensor x, Tensor values, Tensor? bias, Tensor index, int out_channels, int[] conv, "
    "Tensor? tap=None, Tensor? probe=None) -> Tensor",
    "block_sparse_conv2d_dgrad(Tensor dy, Tensor values, Tensor index, SymInt[] input_size, int[] conv) -> Tensor",
    "block_sparse_conv2d_wgrad(Tensor dy, Tensor x, Tensor index, int capacity, int[] block, int[] conv) -> Tensor",
    "block_sparse_conv2d_wgrad_saliency(Tensor dy, Tensor x, Tensor values, Tensor index, int[] conv) "
    "-> (Tensor, Tensor)",
    "conv2d_gradient_probe(Tensor dy, Tensor x, Tensor index, int capacity, int[] block, int[] conv, Tensor probe) "
    "-> Tensor",
    "block_saliency(Tensor values, Tensor grad, Tensor index, int rows, int columns) -> (Tensor, Tensor)",
    "layout_update(Tensor(a!) mask, Tensor(b!) slot_of_block, Tensor(c!) index, int capacity, int[]? conv, "
    "bool release) -> ()",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_ops = torch.ops.dynaprune


def _geometry(conv: list[int] | None) -> ConvGeometry | None:
    return None if conv is None else ConvGeometry(*conv)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(dy: Tensor, x: Tensor, block: list[int], conv: list[int] | None = None) -> int:
    """rows * columns of the weight that maps x to dy."""
    bi, bo = block
    taps, groups = (1, 1) if conv is None else (conv[0] * conv[1], conv[8])
    return ceil_div(dy.shape[1], bo) * taps * ceil_div(x.shape[1] // groups, bi)


def _implement(name: str) -> Any:
    """Register a Python implementation for the devices that have a backend."""

    def register(function: Any) -> Any:
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        return function

    return register


def _select(op: str, x: Tensor, features: int, capacity: int, block: Any, conv: list[int] | None = None) -> Any:
    """Backend for a matrix op between ``x`` (rows or image) and ``features`` outputs of the op."""
    rows = x.shape[0] if conv is None else x.shape[0] * x.shape[2] * x.shape[3]
    taps, groups = (1, 1) if conv is None else (conv[0] * conv[1], conv[8])
    elements = x.shape[1] * features * taps // groups
    return select(op, x.device.type, x.dtype, rows, capacity * block[0] * block[1] / max(elements, 1))


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"dynaprune::{name}", lib=_LIBRARY)


# block_sparse_linear


@_implement("block_sparse_linear")
def _linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_features: int,
    tap: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    return _select("linear_forward", x, out_features, values.shape[0], values.shape[1:]).linear_forward(
        x, values, bias, index, out_features
    )


@_implement("block_sparse_linear_dgrad")
def _linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    backend = _select("linear_dgrad", dy, in_features, values.shape[0], values.shape[1:])
    return backend.linear_dgrad(dy, values, index, in_features)


@_implement("block_sparse_linear_wgrad")
def _linear_wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int]) -> Tensor:
    backend = _select("linear_wgrad", x, dy.shape[1], capacity, block)
    return backend.linear_wgrad(dy, x, index, capacity, block)


@_implement("block_sparse_linear_wgrad_saliency")
def _linear_wgrad_saliency(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    backend = _select("linear_wgrad", x, dy.shape[1], values.shape[0], values.shape[1:])
    return backend.linear_wgrad_saliency(dy, x, values, index)


@_implement("linear_gradient_probe")
def _linear_probe(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int], probe: Tensor) -> Tensor:
    backend = _select("linear_probe", x, dy.shape[1], capacity, block)
    return backend.linear_probe(dy, x, index, capacity, block, probe)


@_fake("block_sparse_linear")
def _(x, values, bias, index, out_features, tap=None, probe=None):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features)


@_fake("block_sparse_linear_dgrad")
def _(dy, values, index, in_features):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[0], in_features)


@_fake("block_sparse_linear_wgrad")
def _(dy, x, index, capacity, block):  # type: ignore[no-untyped-def]
    return x.new_empty(capacity, *block)


@_fake("block_sparse_linear_wgrad_saliency")
def _(dy, x, values, index):  # type: ignore[no-untyped-def]
    blocks = _blocks(dy, x, values.shape[1:])
    return torch.empty_like(values), values.new_empty(blocks, dtype=_accumulator(values.dtype))


@_fake("linear_gradient_probe")
def _(dy, x, index, capacity, block, probe):  # type: ignore[no-untyped-def]
    return x.new_empty(_blocks(dy, x, block), dtype=_accumulator(x.dtype))


# block_sparse_conv2d


@_implement("block_sparse_conv2d")
def _conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_channels: int,
    conv: list[int],
    tap: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    backend = _select("conv2d_forward", x, out_channels, values.shape[0], values.shape[1:], conv)
    return backend.conv2d_forward(x, values, bias, index, out_channels, ConvGeometry(*conv))


@_implement("block_sparse_conv2d_dgrad")
def _conv2d_dgrad(dy: Tensor, values: Tensor, index: Tensor, input_size: list[int], conv: list[int]) -> Tensor:
    backend = _select("conv2d_dgrad", dy, input_size[1], values.shape[0], values.shape[1:], conv)
    return backend.conv2d_dgrad(dy, values, index, input_size, ConvGeometry(*conv))


@_implement("block_sparse_conv2d_wgrad")
def _conv2d_wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int], conv: list[int]) -> Tensor:
    backend = _select("conv2d_wgrad", x, dy.shape[1], capacity, block, conv)
    return backend.conv2d_wgrad(dy, x, index, capacity, block, ConvGeometry(*conv))


@_implement("block_sparse_conv2d_wgrad_saliency")
def _conv2d_wgrad_saliency(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: list[int]
) -> tuple[Tensor, Tensor]:
    backend = _select("conv2d_wgrad", x, dy.shape[1], values.shape[0], values.shape[1:], conv)
    return backend.conv2d_wgrad_saliency(dy, x, values, index, ConvGeometry(*conv))


@_implement("conv2d_gradient_probe")
def _conv2d_probe(
    dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: list[int], conv: list[int], probe: Tensor
) -> Tensor:
    backend = _select("conv2d_probe", x, dy.shape[1], capacity, block, conv)
    return backend.conv2d_probe(dy, x, index, capacity, block, ConvGeometry(*conv), probe)


def _channels_last(like: Tensor, size: Any) -> Tensor:
    return like.new_empty(size).to(memory_format=torch.channels_last)


@_fake("block_sparse_conv2d")
def _(x, values, bias, index, out_channels, conv, tap=None, probe=None):  # type: ignore[no-untyped-def]
    return _channels_last(x, (x.shape[0], out_channels, *ConvGeometry(*conv).output_size(*x.shape[2:])))


@_fake("block_sparse_conv2d_dgrad")
def _(dy, values, index, input_size, conv):  # type: ignore[no-untyped-def]
    return _channels_last(dy, input_size)


@_fake("block_sparse_conv2d_wgrad")
def _(dy, x, index, capacity, block, conv):  # type: ignore[no-untyped-def]
    return x.new_empty(capacity, *block)


@_fake("block_sparse_conv2d_wgrad_saliency")
def _(dy, x, values, index, conv):  # type: ignore[no-untyped-def]
    blocks = _blocks(dy, x, values.shape[1:], conv)
    return torch.empty_like(values), values.new_empty(blocks, dtype=_accumulator(values.dtype))


@_fake("conv2d_gradient_probe")
def _(dy, x, index, capacity, block, conv, probe):  # type: ignore[no-untyped-def]
    return x.new_empty(_blocks(dy, x, block, conv), dtype=_accumulator(x.dtype))


# block_saliency and layout_update


@_implement("block_saliency")
def _block_saliency(values: Tensor, grad: Tensor, index: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    backend = select("block_saliency", values.device.type, values.dtype)
    return backend.block_saliency(values, grad, index, rows, columns)


@_implement("layout_update")
def _layout_update(
    mask: Tensor, slot_of_block: Tensor, index: Tensor, capacity: int, conv: list[int] | None, release: bool
) -> None:
    backend = select("layout_update", mask.device.type, torch.int32)
    backend.layout_update(mask, slot_of_block, index, capacity, _geometry(conv), release)
    torch.autograd.graph.increment_version((mask, slot_of_block, index))


@_fake("block_saliency")
def _(values, grad, index, rows, columns):  # type: ignore[no-untyped-def]
    dtype = _accumulator(values.dtype)
    return (
        values.new_empty(4, rows * columns, dtype=dtype),
        values.new_empty(rows * values.shape[2], dtype=dtype),
    )


@_fake("layout_update")
def _(mask, slot_of_block, index, capacity, conv, release):  # type: ignore[no-untyped-def]
    return None


# autograd: the three matrix ops are one closed algebra, so each one's gradients are the other two


def _tap_gradient(signed: Tensor, probed: Tensor | None) -> Tensor:
    return torch.stack([signed, torch.zeros_like(signed) if probed is None else probed])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, index, _, tap, probe = inputs
    _check_tap(tap, x)
    ctx.save_for_backward(x, values, index, probe if tap is not None else None)
    ctx.has_tap = tap is not None


def _check_tap(tap: Tensor | None, x: Tensor) -> None:
    if tap is not None and tap.dtype != _accumulator(x.dtype):
        raise TypeError(f"expected a {_accumulator(x.dtype)} tap for {x.dtype} inputs, got {tap.dtype}")


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, index, probe = ctx.saved_tensors
    dx = dw = db = dtap = None
    if ctx.needs_input_grad[0]:
        dx = _ops.block_sparse_linear_dgrad(dy, values, index, x.shape[1])
    if ctx.has_tap and ctx.needs_input_grad[5]:
        dw, signed = _ops.block_sparse_linear_wgrad_saliency(dy, x, values, index)
        probed = None
        if probe is not None:
            probed = _ops.linear_gradient_probe(dy, x, index, values.shape[0], values.shape[1:], probe)
        dtap = _tap_gradient(signed, probed)
    elif ctx.needs_input_grad[1]:
        dw = _ops.block_sparse_linear_wgrad(dy, x, index, values.shape[0], values.shape[1:])
    if ctx.needs_input_grad[2]:
        db = dy.sum(0)
    return dx, dw, db, None, None, dtap, None


def _linear_dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, values, index, _ = inputs
    ctx.save_for_backward(dy, values, index)


def _linear_dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, values, index = ctx.saved_tensors
    ddy = dw = None
    if ctx.needs_input_grad[0]:
        ddy = _ops.block_sparse_linear(ddx, values, None, index, dy.shape[1])
    if ctx.needs_input_grad[1]:
        dw = _ops.block_sparse_linear_wgrad(dy, ddx, index, values.shape[0], values.shape[1:])
    return ddy, dw, None, None


def _linear_wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, index, _, _ = inputs
    ctx.save_for_backward(dy, x, index)


def _linear_wgrad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    dy, x, index = ctx.saved_tensors
    ddw = ddw.contiguous()
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = _ops.block_sparse_linear(x, ddw, None, index, dy.shape[1])
    if ctx.needs_input_grad[1]:
        dx = _ops.block_sparse_linear_dgrad(dy, ddw, index, x.shape[1])
    return ddy, dx, None, None, None


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, index, _, conv, tap, probe = inputs
    _check_tap(tap, x)
    ctx.save_for_backward(x, values, index, probe if tap is not None else None)
    ctx.has_tap, ctx.conv = tap is not None, conv


def _conv2d_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, index, probe = ctx.saved_tensors
    conv = ctx.conv
    dx = dw = db = dtap = None
    if ctx.needs_input_grad[0]:
        dx = _ops.block_sparse_conv2d_dgrad(dy, values, index, x.shape, conv)
    if ctx.has_tap and ctx.needs_input_grad[6]:
        dw, signed = _ops.block_sparse_conv2d_wgrad_saliency(dy, x, values, index, conv)
        probed = None
        if probe is not None:
            probed = _ops.conv2d_gradient_probe(dy, x, index, values.shape[0], values.shape[1:], conv, probe)
        dtap = _tap_gradient(signed, probed)
    elif ctx.needs_input_grad[1]:
        dw = _ops.block_sparse_conv2d_wgrad(dy, x, index, values.shape[0], values.shape[1:], conv)
    if ctx.needs_input_grad[2]:
        db = dy.sum((0, 2, 3))
    return dx, dw, db, None, None, None, dtap, None


def _conv2d_dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, values, index, _, conv = inputs
    ctx.save_for_backward(dy, values, index)
    ctx.conv = conv


def _conv2d_dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, values, index = ctx.saved_tensors
    ddy = dw = None
    if ctx.needs_input_grad[0]:
        ddy = _ops.block_sparse_conv2d(ddx, values, None, index, dy.shape[1], ctx.conv)
    if ctx.needs_input_grad[1]:
        dw = _ops.block_sparse_conv2d_wgrad(dy, ddx, index, values.shape[0], values.shape[1:], ctx.conv)
    return ddy, dw, None, None, None


def _conv2d_wgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, index, _, _, conv = inputs
    ctx.save_for_backward(dy, x, index)
    ctx.conv = conv


def _conv2d_wgrad_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    dy, x, index = ctx.saved_tensors
    ddw = ddw.contiguous()
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = _ops.block_sparse_conv2d(x, ddw, None, index, dy.shape[1], ctx.conv)
    if ctx.needs_input_grad[1]:
        dx = _ops.block_sparse_conv2d_dgrad(dy, ddw, index, x.shape, ctx.conv)
    return ddy, dx, None, None, None, None


def _not_differentiable(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"dynaprune::{name} has no gradient: it is a statistic, detach its inputs")

    return backward


for _name, _backward, _setup in (
    ("block_sparse_linear", _linear_backward, _linear_setup),
    ("block_sparse_linear_dgrad", _linear_dgrad_backward, _linear_dgrad_setup),
    ("block_sparse_linear_wgrad", _linear_wgrad_backward, _linear_wgrad_setup),
    ("block_sparse_conv2d", _conv2d_backward, _conv2d_setup),
    ("block_sparse_conv2d_dgrad", _conv2d_dgrad_backward, _conv2d_dgrad_setup),
    ("block_sparse_conv2d_wgrad", _conv2d_wgrad_backward, _conv2d_wgrad_setup),
    ("block_sparse_linear_wgrad_saliency", _not_differentiable("block_sparse_linear_wgrad_saliency"), None),
    ("block_sparse_conv2d_wgrad_saliency", _not_differentiable("block_sparse_conv2d_wgrad_saliency"), None),
    ("linear_gradient_probe", _not_differentiable("linear_gradient_probe"), None),
    ("conv2d_gradient_probe", _not_differentiable("conv2d_gradient_probe"), None),
    ("block_saliency", _not_differentiable("block_saliency"), None),
):
    torch.library.register_autograd(f"dynaprune::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)


# FLOPs of the live blocks; reads the live count, so it syncs: FLOPs are counted eagerly, outside hot loops


def _live_flops(index: Tensor, block: Any, positions: int) -> int:
    return 2 * int(index[N_LIVE].item()) * int(block[0]) * int(block[1]) * positions


def _register_flops(op: Any, formula: Any) -> None:
    register_flop_formula(op, get_raw=True)(formula)


_register_flops(
    _ops.block_sparse_linear,
    lambda x, values, bias, index, *_, **__: _live_flops(index, values.shape[1:], x.shape[0]),
)
_register_flops(
    _ops.block_sparse_linear_dgrad,
    lambda dy, values, index, *_, **__: _live_flops(index, values.shape[1:], dy.shape[0]),
)
_register_flops(
    _ops.block_sparse_linear_wgrad,
    lambda dy, x, index, capacity, block, **__: _live_flops(index, block, dy.shape[0]),
)
_register_flops(
    _ops.block_sparse_linear_wgrad_saliency,
    lambda dy, x, values, index, **__: _live_flops(index, values.shape[1:], dy.shape[0]),
)
_register_flops(
    _ops.block_sparse_conv2d,
    lambda x, values, bias, index, *_, out_val, **__: _live_flops(index, values.shape[1:], _positions(out_val)),
)
_register_flops(
    _ops.block_sparse_conv2d_dgrad,
    lambda dy, values, index, *_, **__: _live_flops(index, values.shape[1:], _positions(dy)),
)
_register_flops(
    _ops.block_sparse_conv2d_wgrad,
    lambda dy, x, index, capacity, block, *_, **__: _live_flops(index, block, _positions(dy)),
)
_register_flops(
    _ops.block_sparse_conv2d_wgrad_saliency,
    lambda dy, x, values, index, *_, **__: _live_flops(index, values.shape[1:], _positions(dy)),
)


def _positions(image: Tensor) -> int:
    return int(image.shape[0] * image.shape[2] * image.shape[3])


def _probe_flops(dy: Tensor, x: Tensor, index: Tensor, block: Any, probe: Tensor, conv: Any, positions: int) -> int:
    if not bool(probe.item()):
        return 0
    unlisted = _blocks(dy, x, block, conv) - int(index[N_LIVE].item())
    return 2 * unlisted * int(block[0]) * int(block[1]) * positions


_register_flops(
    _ops.linear_gradient_probe,
    lambda dy, x, index, capacity, block, probe, **__: _probe_flops(
        dy, x, index, block, probe, None, dy.shape[0]
    ),
)
_register_flops(
    _ops.conv2d_gradient_probe,
    lambda dy, x, index, capacity, block, conv, probe, **__: _probe_flops(
        dy, x, index, block, probe, conv, _positions(dy)
    ),
)
