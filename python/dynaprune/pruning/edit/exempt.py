"""Layers that turn out to be none of the pruner's become dense again."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.optimizer_state import rewrite_state
from dynaprune.pruning.edit.stale_copies import CopyWatch
from dynaprune.pruning.edit.structure import Structure


@torch.no_grad()
def exempt(structure: Structure, names: Iterable[str]) -> None:
    """Make layers dense, with their optimizer state and in every copy, and prune them no longer.

    Their Parameters stay the same objects; nothing may have been removed from them yet.
    """
    names = list(names)
    structure.followers.turn_dense(structure.model, structure.modules, names)
    for name in names:
        layer = structure.layers[name].layer
        if isinstance(layer, BlockSparseLayer):
            for twin in _copies(layer):
                twin.to_dense()
            rewrite_state(structure.optimizers, layer.values, layer.to_dense_shape)
            layer.to_dense()
            # For code that took up the block-sparse layer's name of the Parameter since attach.
            layer.__dict__["values"] = layer.weight
    structure.drop(names)


def _copies(layer: BlockSparseLayer) -> list[BlockSparseLayer]:
    watch = layer.copy_watch
    twins = [ref() for ref in watch.copies] if isinstance(watch, CopyWatch) else []
    return [twin for twin in twins if isinstance(twin, BlockSparseLayer)]
