"""Compaction: free slots leave values, gradient and optimizer state, in place."""

from __future__ import annotations

from torch import Tensor

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.optimizer_state import Optimizers, rewrite_state
from dynaprune.nn.parameter import replace_parameter_data_

GROWTH_HEADROOM = 0.1


def wanted_capacity(layer: BlockSparseLayer, *, exact: bool, growing: bool) -> int:
    """Slots that the layer should have: a step of the ladder, or with ``exact`` no free one. Syncs."""
    used = int((layer.layout.slot_of_block >= 0).sum())
    if growing:
        used = min(layer.layout.blocks, used + max(1, int(used * GROWTH_HEADROOM)))
    elif exact:
        return max(used, 1)
    return min(layer.layout.ladder_capacity(used), layer.layout.capacity)


def compact_layer(
    layer: BlockSparseLayer, capacity: int, optimizers: Optimizers, copies: list[BlockSparseLayer]
) -> None:
    """Change the layer's number of slots, with its gradient, its optimizer state and its followers.

    The Parameter object and the optimizers' param groups stay. Syncs.
    """
    old_slot = layer.layout.compact_(capacity)
    free = (old_slot < 0).view(-1, 1, 1)
    source = old_slot.clamp(min=0)

    def gathered(tensor: Tensor) -> Tensor:
        return tensor.detach()[source.to(tensor.device)].masked_fill_(free.to(tensor.device), 0)

    rewrite_state(optimizers, layer.values, gathered)
    for each in [layer, *copies]:
        grad = each.values.grad
        if each is not layer:
            each.layout.compact_(capacity)
        replace_parameter_data_(each.values, gathered(each.values), None if grad is None else gathered(grad))
