"""The network as a pruner knows it: what edits change, and how much of it is left."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.edit.followers import Followers
from dynaprune.pruning.edit.group_scores import GroupScores
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.edit.neuron_units import NeuronUnits
from dynaprune.pruning.edit.pretrained_blocks import PretrainedBlocks


@dataclass(eq=False)
class Structure:
    """A model with its pruned layers, and all that has to change with them.

    Attributes:
        optimizers: that train it; their state is cut along.
        bystanders: optimizers that the pruner was not given and that were seen to train parameters of the
            model, such as its norms; their state is cut along too.
        layers: the block-sparse layers that are pruned, by name.
        neurons: whole neurons that may go, where they are units of their own.
        followers: copies of the model that are kept in step.
        groups: figures of whole neurons.
        pretrained: where the values of blocks are that have not lived yet; None: they are zeros.
        tokens: tokens (for a convolution output positions) that linear layers and convolutions, block-sparse
            or plain, see in a step; empty until they are counted.
        step_flops: FLOPs of these layers in a step, forward and backward, before anything went; 0 until the
            tokens are counted.
        units: blocks of all layers at attach.
        version: grows with every structural change.
        compactions: layers whose capacity was walked down.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    layers: dict[str, LayerState]
    neurons: NeuronUnits = field(default_factory=NeuronUnits)
    followers: Followers = field(default_factory=Followers)
    groups: GroupScores = field(default_factory=GroupScores)
    pretrained: PretrainedBlocks | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    step_flops: float = 0.0
    units: int = field(init=False)
    version: int = 0
    compactions: int = 0
    bystanders: WeakSet[torch.optim.Optimizer] = field(default_factory=WeakSet)
    _held: dict[torch.optim.Optimizer, frozenset[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.units = sum(state.blocks for state in self.layers.values())
        self._held = {
            each: frozenset(id(p) for group in each.param_groups for p in group["params"])
            for each in self.optimizers
        }

    @property
    def modules(self) -> dict[str, BlockSparseLayer]:
        """The pruned layers themselves, by name."""
        return {name: state.layer for name, state in self.layers.items()}

    def held_by(self, optimizer: torch.optim.Optimizer) -> list[LayerState]:
        """The layers whose weights the optimizer trains."""
        return [s for s in self.layers.values() if id(s.layer.values) in self._held[optimizer]]

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer trains weights that are pruned."""
        return bool(self.trained_by(optimizer))

    def trained_by(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
        """Those of :attr:`trained` that the optimizer holds."""
        return [(name, weight) for name, weight in self.trained if id(weight) in self._held[optimizer]]

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The weights that are pruned, by their name in the model: blocks, and those of whole neurons."""
        values = [(f"{name}.values", state.layer.values) for name, state in self.layers.items()]
        return [*values, *((f"{name}.weight", weight) for name, weight in self.neurons.parameters())]

    def measure(self) -> None:
        """Bring every layer's number of live weights up to date. Syncs."""
        for state in self.layers.values():
            state.measure()
        self.neurons.measure(self.model)

    @property
    def weights(self) -> int:
        """Prunable weights at attach."""
        return sum(state.weights for state in self.layers.values()) + self.neurons.weights

    @property
    def left_out(self) -> int:
        """Blocks that training began without."""
        return sum(state.left_out for state in self.layers.values())

    @property
    def live_weights(self) -> int:
        """Prunable weights that live, as last measured."""
        return sum(state.live_weights for state in self.layers.values()) + self.neurons.live_weights

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights, as they were at attach, that is gone; 0 until they are known."""
        return 1 - self.live_weights / self.weights if self.weights else 0.0

    @property
    def density(self) -> dict[str, float]:
        """Share of each layer's original weights that live."""
        blocks = {name: state.density for name, state in self.layers.items()}
        return {**blocks, **self.neurons.density(self.model)}

    @property
    def live_units(self) -> int:
        """Live units: the share of weights that live, in blocks of average size, rounded up."""
        return math.ceil(self.live_weights / self.weights * self.units - 1e-6) if self.weights else 0

    @property
    def live_parameters(self) -> int:
        """Values that live: of block-sparse weights those of live blocks, of everything else all."""
        swapped = {id(state.layer.values) for state in self.layers.values()}
        rest = sum(p.numel() for p in self.model.parameters() if id(p) not in swapped)
        return rest + sum(state.live_weights for state in self.layers.values())

    def flops_per_block(self, state: LayerState) -> float:
        """FLOPs of a training step that one block of the layer costs."""
        _, inputs, outputs = state.layer.values.shape
        return 6.0 * inputs * outputs * max(self.tokens.get(state.name, 0), 1)

    def weights_of(self, names: Iterable[str], *, first: bool) -> dict[str, int]:
        """Weights of linear layers and convolutions: at ``first``, or those that live, as last measured."""
        found = {}
        for name in names:
            state, layer = self.layers.get(name), self.model.get_submodule(name)
            if state is not None:
                found[name] = state.weights if first else state.live_weights
            else:
                weight: Any = layer.values if isinstance(layer, BlockSparseLayer) else layer.weight
                found[name] = weight.numel()
        return found

    def note_step_flops(self) -> None:
        """Know what a step costs from the tokens of its layers."""
        weights = self.weights_of(self.tokens, first=True)
        self.step_flops = sum(6.0 * weights[name] * tokens for name, tokens in self.tokens.items())

    def drop(self, names: Iterable[str]) -> None:
        """Prune the layers named no longer."""
        for name in names:
            self.units -= self.layers.pop(name).blocks
            self.tokens.pop(name, None)
        self.groups.stop()
