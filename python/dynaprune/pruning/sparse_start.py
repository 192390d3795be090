"""The start of a training with part of its blocks: the others leave before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import live_fan_in
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.initial_masks import Grid, initial_masks
from dynaprune.pruning.edit.compaction import compact_layer


def planned_masks(layers: Mapping[str, BlockSparseLayer], config: PruningConfig) -> dict[str, Tensor]:
    """The blocks that each of the layers begins with, as the configuration asks.

    Raises:
        ValueError: an initial sparsity that these layers cannot have.
    """
    return initial_masks(
        {name: Grid.of(layer.layout) for name, layer in layers.items()},
        config.initial_sparsity,
        allocation=config.initial_allocation,
        floors={name: config.floor_of(name) for name in layers},
        seed=config.seed,
    )


@torch.no_grad()
def keep_blocks(layer: BlockSparseLayer, mask: Tensor) -> int:
    """Drop every block that is not in ``mask`` (bool ``[rows, columns]``), with its weights and gradient.

    Returns:
        Number of blocks dropped.
    """
    layer.layout.update_(mask.to(layer.layout.mask.device))
    compact_layer(layer, int(mask.sum()), (), [])
    return layer.layout.blocks - layer.layout.capacity


@torch.no_grad()
def scale_to_live_fan_in(layer: BlockSparseLayer) -> None:
    """Let outputs vary as they would with every block there: multiply the weights of an output by
    sqrt(inputs / live inputs).

    Initialisers draw weights of a variance c / inputs, and a mask leaves an output fewer. This gives them the
    variance c / live inputs (Evci et al. 2022, "Gradient flow in sparse neural networks and how lottery
    tickets win", arXiv:2010.03533).
    """
    layout = layer.layout
    inputs = layout.in_features // layout.groups * layout.taps
    factor = (inputs / live_fan_in(layout)).sqrt()
    row = (layout.block_of_slot.long().clamp(min=0)) // layout.columns
    layer.values.mul_(factor[row].to(layer.values.dtype).view(-1, 1, 1))
