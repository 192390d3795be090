"""The start of a training with part of its blocks: the others leave before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dynaprune.neurons.norm_behind import norms_behind
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import live_fan_in
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.initial_masks import Grid, initial_masks
from dynaprune.pruning.edit.compaction import compact_layer
from dynaprune.pruning.learning_rate import rate_multiplier
from dynaprune.pruning.prepared import Prepared


def start_sparse(prepared: Prepared, layers: Mapping[str, BlockSparseLayer]) -> Prepared:
    """Leave out random blocks of ``layers``, and scale what stays to the inputs that it has.

    Raises:
        ValueError: an initial sparsity that these layers cannot have.
    """
    grids = {name: Grid.of(layer.layout) for name, layer in layers.items()}
    masks = planned_masks(grids, prepared.config)
    for name, layer in layers.items():
        keep_blocks(layer, masks[name])
    return begun_sparse(prepared, layers)


def begun_sparse(prepared: Prepared, layers: Mapping[str, BlockSparseLayer]) -> Prepared:
    """Scale the weights of layers that have just lost blocks, and say so in what is returned."""
    normed = norms_behind(prepared.model, layers, prepared.example)
    for name, layer in layers.items():
        if name not in normed:
            scale_to_live_fan_in(layer)
    left_out = {name: layer.layout.blocks - layer.layout.live_count() for name, layer in layers.items()}
    return replace(prepared, left_out=left_out, rates=rates_of(layers, prepared.config))


def planned_masks(grids: Mapping[str, Grid], config: PruningConfig) -> dict[str, Tensor]:
    """The blocks that each of the layers begins with, as the configuration asks.

    Raises:
        ValueError: an initial sparsity that these layers cannot have.
    """
    return initial_masks(
        grids,
        config.initial_sparsity,
        allocation=config.initial_allocation,
        floors={name: config.floor_of(name) for name in grids},
        seed=config.seed,
    )


@torch.no_grad()
def keep_blocks(layer: BlockSparseLayer, mask: Tensor) -> None:
    """Drop every block that is not in ``mask`` (bool ``[rows, columns]``), with its weights and gradient."""
    layer.layout.update_(mask.to(layer.layout.mask.device))
    compact_layer(layer, int(mask.sum()), (), [])


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


def rates_of(layers: Mapping[str, BlockSparseLayer], config: PruningConfig) -> dict[str, float]:
    """The multipliers of the learning rates of layers that begin sparse, where they are not 1."""
    if not config.initial_sparsity:
        return {}
    rates = {n: rate_multiplier(each.density(), config.sparse_learning_rate) for n, each in layers.items()}
    return {name: rate for name, rate in rates.items() if rate != 1}
