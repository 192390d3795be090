"""The network as a pruner knows it: what edits change, and how much of it is left."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.edit.followers import Followers
from dynaprune.pruning.edit.group_scores import GroupScores
from dynaprune.pruning.edit.layer_state import LayerState


@dataclass(eq=False)
class Structure:
    """A model with its pruned layers, and all that has to change with them.

    Attributes:
        optimizers: that train it; their state is cut along.
        layers: the layers that are pruned, by name.
        followers: copies of the model that are kept in step.
        groups: figures of whole neurons.
        tokens: tokens (for a convolution output positions) that linear layers and convolutions, block-sparse
            or plain, see in a step; empty until they are counted.
        units: blocks of all layers at attach.
        version: grows with every structural change.
        compactions: layers whose capacity was walked down.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    layers: dict[str, LayerState]
    followers: Followers = field(default_factory=Followers)
    groups: GroupScores = field(default_factory=GroupScores)
    tokens: dict[str, int] = field(default_factory=dict)
    units: int = field(init=False)
    version: int = 0
    compactions: int = 0
    _held: dict[torch.optim.Optimizer, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.units = sum(state.blocks for state in self.layers.values())
        self._held = {each: self._held_by(each) for each in self.optimizers}

    def _held_by(self, optimizer: torch.optim.Optimizer) -> list[str]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, state in self.layers.items() if id(state.layer.values) in held]

    @property
    def modules(self) -> dict[str, BlockSparseLayer]:
        """The pruned layers themselves, by name."""
        return {name: state.layer for name, state in self.layers.items()}

    def held_by(self, optimizer: torch.optim.Optimizer) -> list[LayerState]:
        """The layers whose weights the optimizer trains."""
        return [self.layers[name] for name in self._held[optimizer] if name in self.layers]

    def measure(self) -> None:
        """Bring every layer's number of live weights up to date. Syncs."""
        for state in self.layers.values():
            state.measure()

    @property
    def weights(self) -> int:
        """Prunable weights at attach."""
        return sum(state.weights for state in self.layers.values())

    @property
    def live_weights(self) -> int:
        """Prunable weights that live, as last measured."""
        return sum(state.live_weights for state in self.layers.values())

    @property
    def live_units(self) -> int:
        """Live units: the share of weights that live, in blocks of average size, rounded up."""
        return math.ceil(self.live_weights / self.weights * self.units - 1e-6)

    @property
    def live_parameters(self) -> int:
        """Values that live: of block-sparse weights those of live blocks, of everything else all."""
        swapped = {id(state.layer.values) for state in self.layers.values()}
        rest = sum(p.numel() for p in self.model.parameters() if id(p) not in swapped)
        return rest + self.live_weights

    def flops_per_block(self, state: LayerState) -> float:
        """FLOPs of a training step that one block of the layer costs."""
        _, inputs, outputs = state.layer.values.shape
        return 6.0 * inputs * outputs * max(self.tokens.get(state.name, 0), 1)

    def drop(self, names: Iterable[str]) -> None:
        """Prune the layers named no longer."""
        for name in names:
            self.units -= self.layers.pop(name).blocks
            self.tokens.pop(name, None)
        self.groups.stop()
