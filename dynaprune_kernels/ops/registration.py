"""What every op family needs to register itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from dynaprune_kernels.geometry import ceil_div
from dynaprune_kernels.index import N_LIVE
from dynaprune_kernels.ops.transforms import transformable

LIBRARY = torch.library.Library("dynaprune", "DEF")
OPS = torch.ops.dynaprune


def define(schema: str) -> None:
    """Declare an op."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str) -> Callable[[Any], Any]:
    """Register one Python implementation, which picks a backend, for CPU and CUDA."""

    def register(function: Any) -> Any:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        return function

    return register


def fake(name: str) -> Callable[[Any], Any]:
    """Register the op's shapes and strides."""
    return torch.library.register_fake(f"dynaprune::{name}", lib=LIBRARY)


def autograd(name: str, backward: Any, setup: Any) -> None:
    """Register the op's gradient: ``setup(ctx, inputs, output)`` saves what ``backward(ctx, *grads)`` needs.

    ``torch.library.register_autograd`` costs 20 us more per call, much of a small layer's step.
    """
    op = getattr(OPS, name).default
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        if setup is not None:
            setup(ctx, inputs, output)
        return output

    function: Any = type(
        f"{name}_gradient",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    transformed = transformable(op, backward, setup)

    def call(*given: Any) -> Any:
        if forward_ad._current_level >= 0:
            return transformed(*given)
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return op(*given)
        return function.apply(*given, *defaults[len(given) :])

    LIBRARY.impl(name, call, "Autograd")
    LIBRARY.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")


def no_autograd(name: str) -> None:
    """Make backward through a statistic an error instead of a silent zero."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"dynaprune::{name} has no gradient: it is a statistic, detach its inputs")

    autograd(name, backward, None)


def flops(op: Any, formula: Any) -> None:
    """Register a FLOP formula over raw tensors; it reads the live count, so it syncs: count eagerly."""
    register_flop_formula(op, get_raw=True)(formula)


def live_flops(index: Tensor, block: Sequence[int], tokens: int) -> int:
    """Multiply-adds, counted as two, of the live blocks over ``tokens``, or output pixels."""
    return 2 * int(index[N_LIVE].item()) * int(block[0]) * int(block[1]) * tokens


def probe_flops(blocks: int, index: Tensor, block: Sequence[int], tokens: int, probe: Tensor) -> int:
    """FLOPs of the gradient probe: the blocks that are not live, while ``probe`` is true."""
    unlisted = blocks - int(index[N_LIVE].item())
    return 2 * unlisted * int(block[0]) * int(block[1]) * tokens if bool(probe.item()) else 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums: float64 of float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_blocks(out_features: int, in_features: int, block: Sequence[int], taps: int = 1) -> int:
    """rows * columns of a weight cut into ``block`` (outputs, inputs)."""
    return ceil_div(out_features, block[0]) * taps * ceil_div(in_features, block[1])


def check_tap(tap: Tensor | None, x: Tensor) -> None:
    """Raise where the tap cannot hold the statistics: TypeError for its dtype, ValueError for its rows."""
    if tap is not None and tap.dtype != accumulator(x.dtype):
        raise TypeError(f"expected a {accumulator(x.dtype)} tap for {x.dtype} inputs, got {tap.dtype}")
    if tap is not None and tap.shape[0] not in (2, 3):
        raise ValueError(f"expected a tap of 2 or 3 rows, got shape {tuple(tap.shape)}")


def tap_gradient(signed: Tensor, probed: Tensor | None, *further: Tensor) -> Tensor:
    """What backward hands out through the tap, by its rows."""
    return torch.stack([signed, torch.zeros_like(signed) if probed is None else probed, *further])
