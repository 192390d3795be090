"""Whole neurons as units of pruning: which may go, and how much of what they hold is left.

A neuron holds its rows in the layers that make it and its columns in the layers that read it. The target is a
share of the weights of plain layers that lie in a row or a column of a neuron that may go; what block-sparse
layers hold counts with their blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.neurons.groups import NeuronGroup
from dynaprune.nn import BlockSparseLayer


@dataclass(eq=False)
class NeuronUnits:
    """The neurons of a model that may go.

    Attributes:
        makers: plain layers whose neurons may go, by name.
        sizes: weights of every plain layer that gets narrower as they go, as they were at first.
        weights: of these, those that belong to a neuron that may go; 0 until the groups are known.
        live_weights: of these, those that are left, as last measured.
        refused: layers whose neurons turned out to stay, with the reason.
        known: whether it was counted what the neurons hold.
        flops: of a forward pass of the example inputs, of every linear layer and convolution by name, as last
            measured; empty where blocks go too.
        first_flops: of all of them, at first.
    """

    makers: dict[str, nn.Module] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    live_weights: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    known: bool = False
    flops: dict[str, int] = field(default_factory=dict)
    first_flops: int = 0

    @property
    def flops_gone(self) -> float | None:
        """Share of the first forward FLOPs that is gone; None where they are not measured."""
        return 1 - sum(self.flops.values()) / self.first_flops if self.first_flops else None

    def note_flops(self, flops: Mapping[str, int]) -> None:
        """Take what was measured; the first time it is what shares are of."""
        self.flops = dict(flops)
        self.first_flops = self.first_flops or sum(flops.values())

    def may_go(self, model: nn.Module, group: NeuronGroup) -> bool:
        """Whether all that make ``group`` are layers whose neurons may go, plain or block-sparse."""
        names = [member.name for member in group.producers]
        return not any(name in self.refused for name in names) and all(
            name in self.makers or isinstance(model.get_submodule(name), BlockSparseLayer) for name in names
        )

    def know(self, model: nn.Module, groups: Iterable[NeuronGroup]) -> None:
        """Count what ``groups`` hold, the ones that may go, at first."""
        for name, (outputs, inputs) in _members(groups).items():
            layer: Any = model.get_submodule(name)
            weight = layer._parameters.get("weight")
            if isinstance(layer, BlockSparseLayer) or weight is None or weight.dim() < 2:
                continue
            stay = (weight.shape[0] - outputs) * (weight.shape[1] - inputs)
            self.sizes[name] = weight.numel()
            self.weights += weight.numel() - stay * math.prod(weight.shape[2:])
        self.known = True
        self.measure(model)

    def measure(self, model: nn.Module) -> None:
        """Bring :attr:`live_weights` up to date."""
        self.live_weights = self.weights - sum(self.sizes.values()) + sum(self.left(model).values())

    def left(self, model: nn.Module) -> dict[str, int]:
        """Weights that the layers of :attr:`sizes` have now."""
        return {name: _weight(model, name).numel() for name in self.sizes}

    def density(self, model: nn.Module) -> dict[str, float]:
        """Share of the first weights that the layers of :attr:`sizes` have now."""
        return {name: left / self.sizes[name] for name, left in self.left(model).items()}

    def widths(self) -> dict[str, tuple[int, ...]]:
        """Outputs and inputs of :attr:`makers` now."""
        return {name: tuple(weight.shape[:2]) for name, weight in self.parameters()}

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The weights of :attr:`makers`, by the layer's name."""
        weights = ((name, layer.weight) for name, layer in self.makers.items())
        return [(name, weight) for name, weight in weights if isinstance(weight, nn.Parameter)]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: plain values."""
        return {
            "sizes": dict(self.sizes),
            "weights": self.weights,
            "live_weights": self.live_weights,
            "refused": dict(self.refused),
            "known": self.known,
            "flops": dict(self.flops),
            "first_flops": self.first_flops,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; an empty one starts afresh."""
        self.sizes = {name: int(size) for name, size in state.get("sizes", {}).items()}
        self.weights, self.live_weights = (int(state.get(key, 0)) for key in ("weights", "live_weights"))
        self.refused, self.known = dict(state.get("refused", {})), bool(state.get("known", False))
        self.flops = {name: int(flops) for name, flops in state.get("flops", {}).items()}
        self.first_flops = int(state.get("first_flops", 0))


def _weight(model: nn.Module, name: str) -> Tensor:
    weight: Any = model.get_submodule(name).weight
    return weight


def _members(groups: Iterable[NeuronGroup]) -> dict[str, tuple[int, int]]:
    """How many different outputs and inputs of each layer belong to ``groups``."""
    found: dict[tuple[str, bool], list[Tensor]] = {}
    for group in groups:
        for member in group.members:
            found.setdefault((member.name, member.outputs), []).append(member.index)
    counts = {key: torch.cat(parts).unique().numel() for key, parts in found.items()}
    return {name: (counts.get((name, True), 0), counts.get((name, False), 0)) for name, _ in counts}
