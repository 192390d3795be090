"""Groups of neurons that can go: which are dead or constant, and why one stays all the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynaprune.neurons.folding import Observation, cannot_fold
from dynaprune.neurons.groups import Member, NeuronGroup
from dynaprune.neurons.surgery import block_mask
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape


def blocks_of_group(model: nn.Module, group: NeuronGroup) -> dict[str, Tensor]:
    """The blocks that make and read ``group``, live or not: bool ``[rows, columns]`` by sparse layer."""
    found: dict[str, Tensor] = {}
    for member in group.members:
        layer = model.get_submodule(member.name)
        if isinstance(layer, BlockSparseLayer):
            blocks = found.setdefault(member.name, torch.zeros_like(layer.layout.mask))
            blocks |= member_blocks(layer, member)
    return found


def member_blocks(layer: BlockSparseLayer, member: Member) -> Tensor:
    layout = layer.layout
    size, block = (
        (layout.out_features, layout.block[0]) if member.outputs else (layout.in_features, layout.block[1])
    )
    chosen = block_mask(_mask(member.index, size), block).to(layout.mask.device)
    return (chosen.unsqueeze(1) if member.outputs else chosen.repeat(layout.taps)).expand_as(layout.mask)


def _mask(index: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, index, True)


@dataclass(frozen=True)
class Candidate:
    """A group that can go, and the readers that take up its constant (none where nothing reads it)."""

    group: NeuronGroup
    folded: tuple[Member, ...]


class DeadUnits:
    """Which outputs and inputs of the block-sparse layers have no block left, on the CPU.

    Plain layers are never dead: weights that are zero now (a freshly initialised output layer) may train.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[tuple[str, bool], Tensor] = {}
        for name, layer in sparse_layers(model).items():
            layout = layer.layout
            held = (layout.slot_of_block >= 0).cpu()
            taps = layout.taps
            rows, columns = ~held.any(1), ~held.view(layout.rows, taps, -1).any(0).any(0)
            self._of[name, True] = rows.repeat_interleave(layout.block[0])[: layout.out_features]
            self._of[name, False] = columns.repeat_interleave(layout.block[1])[: layout.in_features]

    def _member(self, member: Member) -> bool:
        dead = self._of.get((member.name, member.outputs))
        return dead is not None and bool(dead[member.index].all())

    def refuse(self, refused: dict[str, str], group: NeuronGroup, reason: str) -> None:
        """Enter why ``group`` stays, at every layer that has dead outputs in it."""
        makers = (m.name for m in group.members if m.outputs and self._member(m))
        refused.update(dict.fromkeys((group.name, *makers), reason))

    def any_output(self, name: str) -> bool:
        """Whether the layer ``name`` has a dead output."""
        dead = self._of.get((name, True))
        return dead is not None and bool(dead.any())

    def candidate(self, group: NeuronGroup) -> Candidate | None:
        live = tuple(m for m in group.readers if not self._member(m))
        if not live or all(self._member(m) for m in group.producers):
            return Candidate(group, live)
        return None


def sparse_layers(model: nn.Module) -> dict[str, BlockSparseLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)}


def above_floor(
    model: nn.Module, candidates: list[Candidate], floor: float, refused: dict[str, str]
) -> list[Candidate]:
    """Drop the last candidates of layers that would fall below the floor or lose everything."""
    left: dict[str, tuple[int, int]] = {}
    kept = []
    for candidate in candidates:
        name = candidate.group.name
        width = width_of(model.get_submodule(name), outputs=True)
        have, least = left.get(name, (width, max(1, math.ceil(floor * width))))
        have -= int(candidate.group.neurons.numel())
        if have < least:
            refused[name] = f"{least} of its {width} outputs stay (floor {floor})"
            continue
        left[name] = (have, least)
        kept.append(candidate)
    return kept


def width_of(module: nn.Module, *, outputs: bool) -> int:
    shape = layer_shape(module)
    assert shape is not None
    return shape.out if outputs or not shape.in_ else shape.in_


def why_not(model: nn.Module, candidate: Candidate, before: Observation, batch: Observation) -> str:
    if candidate.folded and candidate.group.scaled:
        return "data scales or masks it before it is read: what is constant for one batch is not for another"
    for member in candidate.folded:
        reader = model.get_submodule(member.name)
        averaged = candidate.group.averaged
        if reason := cannot_fold(reader, member.name, member.index, before, batch, averaged=averaged):
            return reason
    return ""
