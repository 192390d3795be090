"""Derivatives of the loss by gates on what a layer reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer

_CHUNK = 2**20


def input_gates(layer: nn.Module) -> Tensor | None:
    """``sum w dL/dw`` over all weights that read an input: the derivative of the loss by a gate on it.

    Args:
        layer: a linear layer or convolution, block-sparse or plain, whose gradient is there.

    Returns:
        ``[in]`` float32 (float64 of a float64 weight), None without a gradient. Not finite where the gradient
        is not.
    """
    if isinstance(layer, BlockSparseLayer):
        return None if layer.values.grad is None else _sparse_gates(layer, layer.values.grad)
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or weight.grad is None:
        return None
    groups = int(getattr(layer, "groups", 1))
    w, g = (t.detach().reshape(groups, t.shape[0] // groups, -1) for t in (weight, weight.grad))
    total = torch.zeros(w.shape[0], w.shape[2], dtype=_wide(weight), device=weight.device)
    for part, grad in _chunked(w, g, 1):
        total += (part.to(total.dtype) * grad).sum(1)
    return total.view(groups, weight.shape[1], -1).sum(2).reshape(-1)


def _sparse_gates(layer: BlockSparseLayer, grad: Tensor) -> Tensor:
    layout, values = layer.layout, layer.values.detach()
    capacity, bi, _ = values.shape
    groups, taps = layout.groups, layout.taps
    per_slot = torch.empty(capacity, bi, dtype=_wide(values), device=values.device)
    start = 0
    for part, part_grad in _chunked(values, grad, 0):
        per_slot[start : start + len(part)] = (part.to(per_slot.dtype) * part_grad).sum(2)
        start += len(part)
    block = layout.block_of_slot.long()
    per_slot.masked_fill_(~layout.slots_of(layout.mask).unsqueeze(1), 0)
    row, column = block.clamp(min=0) // layout.columns, block.clamp(min=0) % layout.columns
    blocks = layout.columns // taps
    place = row * groups // layout.rows * blocks + column % blocks
    total = per_slot.new_zeros(groups * blocks, bi).index_add_(0, place, per_slot)
    return total.view(groups, -1)[:, : layout.in_features // groups].reshape(-1)


def _chunked(a: Tensor, b: Tensor, dim: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Both in pieces along ``dim`` whose products stay small: a layer's worth would cost its memory again."""
    size = max(1, _CHUNK * a.shape[dim] // max(1, a.numel()))
    return list(zip(a.split(size, dim), b.split(size, dim), strict=True))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
