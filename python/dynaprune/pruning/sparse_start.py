"""The start of a training with part of its blocks: the others leave before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dynaprune.neurons.norm_behind import norms_behind
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import live_fan_in
from dynaprune.pruning.checks.pretrained import refuse_trained
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.initial_masks import Grid, Order, initial_masks, scored_order
from dynaprune.pruning.edit.compaction import compact_layer
from dynaprune.pruning.edit.pretrained_blocks import PretrainedBlocks, local_checkpoint
from dynaprune.pruning.learning_rate import rate_multiplier
from dynaprune.pruning.observe.block_fisher import Calibration, block_fisher
from dynaprune.pruning.prepared import Prepared


def start_sparse(prepared: Prepared) -> Prepared:
    """Leave out random blocks of the layers that were swapped, and scale what stays to the inputs it has.

    Nothing where training begins dense, or the model came block-sparse.

    Raises:
        ValueError: weights that look trained, or an initial sparsity that these layers cannot have.
    """
    config, layers = prepared.config, _layers(prepared)
    if not config.initial_sparsity or not layers:
        return prepared
    if not config.mask_pretrained:
        refuse_trained(prepared.model)
    masks = planned_masks({name: Grid.of(layer.layout) for name, layer in layers.items()}, config)
    for name, layer in layers.items():
        keep_blocks(layer, masks[name])
    return begun_sparse(prepared, layers)


def start_pretrained(prepared: Prepared, calibration: Calibration, checkpoint: Path | None) -> Prepared:
    """Leave out the blocks of a trained network that matter least, by their block Fisher information.

    The weights that stay are what they were.

    Args:
        checkpoint: file or folder that the weights come from, for blocks that grow back; None: where the
            model's configuration says that it was loaded from.

    Raises:
        ValueError: a model that came block-sparse, a checkpoint of other weights, an initial sparsity that
            these layers cannot have.
    """
    config, layers = prepared.config, _layers(prepared)
    if not layers:
        raise ValueError("expected a calibration with a model of plain layers, got block-sparse ones")
    found = checkpoint or local_checkpoint(prepared.model)
    pretrained = None if found is None else PretrainedBlocks.of(layers, found)
    if config.regrow or config.rewire:
        _say_what_returns_empty(layers, pretrained)
    scores = block_fisher(prepared.model, layers, calibration)
    grids = {name: Grid.of(layer.layout) for name, layer in layers.items()}
    orders = {name: scored_order(grid, scores[name]) for name, grid in grids.items()}
    masks = planned_masks(grids, config, orders)
    for name, layer in layers.items():
        keep_blocks(layer, masks[name])
    return replace(_with_figures(prepared, layers), pretrained=pretrained)


def _say_what_returns_empty(layers: Mapping[str, BlockSparseLayer], found: PretrainedBlocks | None) -> None:
    empty = [name for name in layers if found is None or name not in found.weights]
    if not empty:
        return
    told = "blocks that are left out now grow back as zeros: "
    if found is None:
        told += "give prepare the checkpoint that the weights come from (checkpoint=), and they grow back as "
        told += "they are there"
    else:
        told += f"those of {', '.join(empty)}, which the checkpoint does not have"
    warnings.warn(told, RuntimeWarning, stacklevel=4)


def begun_sparse(prepared: Prepared, layers: Mapping[str, BlockSparseLayer]) -> Prepared:
    """Scale the weights of layers that have just lost blocks, and say so in what is returned."""
    normed = norms_behind(prepared.model, layers, prepared.example)
    for name, layer in layers.items():
        if name not in normed:
            scale_to_live_fan_in(layer)
    return _with_figures(prepared, layers)


def _with_figures(prepared: Prepared, layers: Mapping[str, BlockSparseLayer]) -> Prepared:
    left_out = {name: layer.layout.blocks - layer.layout.live_count() for name, layer in layers.items()}
    return replace(prepared, left_out=left_out, rates=rates_of(layers, prepared.config))


def _layers(prepared: Prepared) -> dict[str, BlockSparseLayer]:
    layers = {name: prepared.model.get_submodule(name) for name in prepared.swapped}
    return {name: layer for name, layer in layers.items() if isinstance(layer, BlockSparseLayer)}


def planned_masks(
    grids: Mapping[str, Grid], config: PruningConfig, orders: Mapping[str, Order] | None = None
) -> dict[str, Tensor]:
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
        orders=orders,
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
