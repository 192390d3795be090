"""A cut of neurons as values: what goes, what stays, and the constants that move into biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynaprune.neurons.candidates import Candidate, sparse_layers, width_of
from dynaprune.neurons.folding import Observation, contribution
from dynaprune.neurons.surgery import block_mask
from dynaprune.nn import BlockSparseLayer


class Kept(NamedTuple):
    """What stays of a block-sparse layer, int64, in the old numbering: block rows, block columns, outputs."""

    rows: Tensor
    columns: Tensor
    neurons: Tensor


@dataclass(frozen=True)
class CutPlan:
    """What to cut, in the numbering before: bool masks of outputs and inputs by layer, and folded inputs.

    ``folds``: for each reader that takes up constants, int64 inputs that are constant. ``amounts``: what they
    add to the reader's outputs, float64 ``[out]``. ``silent``: the constants are those of makers that are
    zero, whatever they are now (``dynaprune.neurons.silence``).
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    folds: dict[str, Tensor]
    amounts: dict[str, Tensor]
    silent: bool = False

    def outputs(self) -> dict[str, Tensor]:
        """int64 outputs that go, by layer."""
        return {name: outputs.nonzero().squeeze(1) for name, (outputs, _) in self.layers.items()}


@dataclass
class CutReport:
    """Outcome of :func:`find_cut`; see the module's text."""

    neurons: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    kept: dict[str, Kept] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    plan: CutPlan | None = None


def slots_in(model: nn.Module, kept: Mapping[str, Kept]) -> int:
    """Blocks that hold values and do not stay, over all layers."""
    total = 0
    for name, layer in sparse_layers(model).items():
        if name in kept:
            held = (layer.layout.slot_of_block >= 0).cpu()
            total += int(held.sum() - held[kept[name].rows][:, kept[name].columns].sum())
    return total


def plan_of(
    model: nn.Module, candidates: Sequence[Candidate], observed: Observation, *, silent: bool = False
) -> CutPlan:
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    folds: dict[str, list[Tensor]] = {}
    for candidate in candidates:
        for member in candidate.group.members:
            if member.name not in layers:
                module = model.get_submodule(member.name)
                layers[member.name] = (
                    torch.zeros(width_of(module, outputs=True), dtype=torch.bool),
                    torch.zeros(width_of(module, outputs=False), dtype=torch.bool),
                )
            layers[member.name][0 if member.outputs else 1][member.index] = True
        for member in candidate.folded:
            folds.setdefault(member.name, []).append(member.index)
    folded = {name: torch.cat(parts).unique() for name, parts in folds.items()}
    return CutPlan(layers, folded, amounts_of(model, folded, observed), silent)


def amounts_of(model: nn.Module, folds: Mapping[str, Tensor], observed: Observation) -> dict[str, Tensor]:
    """What the constants of ``folds`` add to each reader's outputs, as they were ``observed``."""
    return {
        name: contribution(model.get_submodule(name), observed, name, index) for name, index in folds.items()
    }


def kept_of(model: nn.Module, plan: CutPlan) -> dict[str, Kept]:
    kept = {}
    for name, (outputs, inputs) in plan.layers.items():
        layer = model.get_submodule(name)
        if isinstance(layer, BlockSparseLayer):
            rows = ~block_mask(outputs, layer.layout.block[0])
            columns = ~block_mask(inputs, layer.layout.block[1])
            kept[name] = Kept(
                *(m.nonzero().squeeze(1) for m in (rows, columns.repeat(layer.layout.taps), ~outputs))
            )
    return kept
