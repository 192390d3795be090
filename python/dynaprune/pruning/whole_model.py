"""What a pruner's figures are of the whole network: every Parameter once, the dense rest with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape, original_widths
from dynaprune.nn.weight_account import held_weights, why_whole
from dynaprune.pruning.edit.structure import Structure


@dataclass(frozen=True)
class ModelSize:
    """Values in a model's Parameters, each Parameter once.

    Attributes:
        layers: weights by the name of a report's entry: a layer, or a Parameter of a layer with several.
        other: biases, parameters of norms, and other vectors.
    """

    layers: dict[str, int]
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.layers.values()) + self.other


def model_size(
    model: nn.Module,
    layers: Mapping[str, BlockSparseLayer],
    exempt: Mapping[str, str],
    weights: Mapping[str, int],
) -> ModelSize:
    """Count ``model``, in which ``layers`` hold as many weights as ``weights`` says by name."""
    pruned = {id(layer.values): weights[name] for name, layer in layers.items()}
    found: dict[str, int] = {}
    other = 0
    for held in held_weights(model, [*layers, *exempt]):
        size = 0 if held.counted_under else pruned.get(id(held.parameter), held.parameter.numel())
        if held.entry:
            found[held.entry] = found.get(held.entry, 0) + size
        else:
            other += size
    return ModelSize(found, other)


def widths_of_cut_layers(model: nn.Module) -> dict[str, dict[str, int]]:
    """Outputs and inputs, now and before the first cut, of every layer with weights that lost some."""
    found = {}
    for name, module in model.named_modules():
        shape, first = layer_shape(module), original_widths(module)
        if shape is not None and shape.in_ and first is not None:
            found[name] = {
                "outputs": shape.out,
                "inputs": shape.in_,
                "outputs_at_first": first[0],
                "inputs_at_first": first[1],
            }
    return found


def report_layers(
    structure: Structure, exempt: Mapping[str, str], at_attach: ModelSize
) -> dict[str, dict[str, Any]]:
    """Every weight of the model by layer: its density, why it stays whole, and its weights at attach.

    A weight that is tied to another counts there, and has no weights of its own here.
    """
    live = {name: state.live_weights for name, state in structure.layers.items()}
    now = model_size(structure.model, structure.modules, exempt, live).layers
    density = {name: state.density for name, state in structure.layers.items()}
    narrower = dict.fromkeys(structure.neurons.sizes, "")
    reasons = {**dict.fromkeys(structure.layers, ""), **exempt, **narrower}
    trained = {id(p) for o in structure.optimizers for group in o.param_groups for p in group["params"]}
    for held in held_weights(structure.model, reasons):
        if not held.entry:
            continue
        if held.entry not in reasons:
            reasons[held.entry] = why_whole(held)
            if not held.parameter.requires_grad:
                reasons[held.entry] += "; it is frozen"
            elif id(held.parameter) not in trained:
                reasons[held.entry] += "; no optimizer given holds it"
        if held.counted_under and reasons[held.entry]:
            reasons[held.entry] += f"; it counts under {held.counted_under}"
    lines = {}
    for name, reason in reasons.items():
        first = at_attach.layers.get(name, now.get(name, 0))
        left = density[name] if name in density else now.get(name, 0) / first if first else 1.0
        lines[name] = {"density": left, "exempt": reason, "weights": first}
    return lines
