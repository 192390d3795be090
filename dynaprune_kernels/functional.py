"""The typed public functions: shapes of any rank, autocast, and checks before any kernel runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynaprune_kernels.layout import BlockLayout
from dynaprune_kernels.memory_format import answers_channels_last


class BlockSaliency(NamedTuple):
    """Sums over each live block (``[rows, columns]``, zeros where not live) and each output (``[out]``)."""

    weight_square: Tensor
    grad_square: Tensor
    weight_grad_abs: Tensor
    weight_grad: Tensor
    neuron_weight_grad: Tensor


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    device_type = tensors[0].device.type if tensors[0] is not None else "cpu"
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def _check(x: Tensor, values: Tensor, bias: Tensor | None, layout: BlockLayout, channel_dim: int) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"expected a BlockLayout, got {type(layout).__name__}")
    bo, bi = layout.block
    if values.shape != (layout.capacity, bi, bo):
        raise ValueError(f"expected values of shape {(layout.capacity, bi, bo)}, got {tuple(values.shape)}")
    if x.dim() <= -channel_dim - 1 or x.shape[channel_dim] != layout.in_features:
        raise ValueError(
            f"expected {layout.in_features} input features, got an input of shape {tuple(x.shape)}"
        )
    if not x.is_floating_point() or x.dtype != values.dtype:
        raise TypeError(f"expected input and values of one floating dtype, got {x.dtype} and {values.dtype}")
    if x.device != values.device or layout.index.device != values.device:
        raise ValueError(
            f"expected input, values and layout on one device, got {x.device}, {values.device}, "
            f"{layout.index.device}"
        )
    if bias is not None and (bias.shape != (layout.out_features,) or bias.dtype != x.dtype):
        raise ValueError(
            f"expected a {x.dtype} bias of shape {(layout.out_features,)}, "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    *,
    tap: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + b`` over the live blocks of ``W [out, in]``.

    Args:
        x: ``[..., in]``, the dtype of ``values`` (under autocast, both are cast).
        values: ``[capacity, bi, bo]``.
        bias: ``[out]`` or None.
        tap: ``[2, rows * columns]`` leaf that collects block statistics as its gradient (see ``ops``); with
            three rows also the mean square of each block's inputs.
        probe: bool scalar tensor; while true, ``tap`` also gets the gradient norms of blocks that are not
        live.

    Returns:
        ``[..., out]``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit.
    """
    x, values, bias = _autocast(x, values, bias)  # type: ignore[assignment]
    _check(x, values, bias, layout, -1)
    if layout.conv is not None:
        raise ValueError("expected a linear layer's layout, got a convolution's")
    rows = x.reshape(-1, layout.in_features)
    y = torch.ops.dynaprune.block_sparse_linear(
        rows, values, bias, layout.index, layout.out_features, tap, probe
    )
    return y.reshape(*x.shape[:-1], layout.out_features)


def block_sparse_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    *,
    tap: Tensor | None = None,
    probe: Tensor | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """2-D convolution over the live blocks of ``W [out, in / groups, kh, kw]``.

    Args:
        x: ``[N, in, H, W]`` or ``[in, H, W]``. On a GPU channels-last memory avoids copies; the CPU kernels
            read contiguous memory, too.
        values, bias, tap, probe: as in :func:`block_sparse_linear`.
        channels_last: memory format of the output and of the gradient of ``x``; by default that of ``x``. A
            convolution answers in channels-last where its input or its weight is (see
            :mod:`dynaprune_kernels.memory_format`): pass true where the dense weight would be.

    Returns:
        ``[N, out, OH, OW]``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, or an input smaller than the kernel.
    """
    x, values, bias = _autocast(x, values, bias)  # type: ignore[assignment]
    _check(x, values, bias, layout, -3)
    if layout.conv is None or x.dim() not in (3, 4):
        raise ValueError(
            f"expected a convolution's layout and [N, C, H, W], got an input of shape {tuple(x.shape)}"
        )
    layout.conv.output_size(x.shape[-2], x.shape[-1])
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    y = torch.ops.dynaprune.block_sparse_conv2d(
        batch,
        values,
        bias,
        layout.index,
        layout.out_features,
        layout.conv,
        tap,
        probe,
        answers_channels_last(batch, channels_last),
    )
    return y if x.dim() == 4 else y.squeeze(0)


def block_saliency(values: Tensor, grad: Tensor, layout: BlockLayout) -> BlockSaliency:
    """One pass over values and gradient (both ``[capacity, bi, bo]``): what every score is made of.

    Returns:
        float32 sums (float64 of float64 values); see :class:`BlockSaliency`.

    Raises:
        ValueError: gradient and values of different shape, dtype or device.
    """
    if values.shape != grad.shape or values.dtype != grad.dtype or values.device != grad.device:
        raise ValueError(
            f"expected a gradient like the values {tuple(values.shape)} {values.dtype} {values.device}, "
            f"got {tuple(grad.shape)} {grad.dtype} {grad.device}"
        )
    if values.shape != (layout.capacity, layout.block.inputs, layout.block.outputs):
        raise ValueError(
            f"expected values of shape {(layout.capacity, layout.block.inputs, layout.block.outputs)}, "
            f"got {tuple(values.shape)}"
        )
    stats, neuron = torch.ops.dynaprune.block_saliency(
        values.detach(), grad.detach(), layout.index, layout.rows, layout.columns
    )
    stats = stats.view(4, layout.rows, layout.columns)
    return BlockSaliency(stats[0], stats[1], stats[2], stats[3], neuron[: layout.out_features])
