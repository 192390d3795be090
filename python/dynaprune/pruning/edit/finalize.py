"""The end of pruning: plain layers again, in the model, its optimizers and its copies."""

from __future__ import annotations

import torch

from dynaprune.nn import swap_back
from dynaprune.nn.block_sparse import as_it_is
from dynaprune.nn.optimizer_state import rewrite_state
from dynaprune.pruning.edit.structure import Structure


@torch.no_grad()
def finalize(structure: Structure) -> None:
    """Give the model and its followers plain layers; optimizer state goes back to the dense shapes."""
    for layer in structure.modules.values():
        rewrite_state(structure.optimizers, layer.values, layer.to_dense_shape)
    structure.followers.swap_back(structure.model, structure.modules)
    for state in structure.layers.values():
        state.layer = as_it_is(state.layer)
    swap_back(structure.model)
