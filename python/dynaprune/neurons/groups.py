"""Which neurons hang together: groups that can be cut out of a network without splitting a block.

One forward pass is followed (``dependency_graph``) from every layer's outputs through norms, activations,
skip connections, gates, splits, reshapes and attention to all layers that read them. Plain data is kept.

A block-sparse layer loses whole block rows or block columns only, so neurons are merged until every block of
every layer is wholly inside or outside a group: with ``bo = 32`` before ``bi = 64`` a group is 64 neurons.

What attention computes ties the outputs of its projections together into whole heads: part of a head cannot
go. With grouped queries a key and value head goes with all its query heads.

What cannot be followed costs the groups that touch it, and only those; ``NeuronMap`` says what and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dynaprune.neurons.channel_sets import DisjointSets
from dynaprune.neurons.dependency_graph import DependencyGraph, Layer, trace
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape


@dataclass(frozen=True)
class Member:
    """One layer of a group: which of its outputs (or, with ``outputs`` false, inputs) belong to it.

    ``index`` int64, on the CPU. ``along``: neither maker nor reader, it only goes along: a norm, a depthwise
    convolution, an attention's query or key.
    """

    name: str
    outputs: bool
    along: bool
    index: Tensor


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that can only be cut together. The first member is the layer that the group is named after.

    ``averaged``: attention averages over positions between makers and readers, so that a constant reaches the
    readers with the rounding of that average. ``scaled``: data scales or masks the neurons between makers and
    readers, so that a constant of one batch is none for another.
    """

    members: tuple[Member, ...]
    averaged: bool = False
    scaled: bool = False

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def neurons(self) -> Tensor:
        """int64 outputs of the first layer."""
        return self.members[0].index

    @property
    def producers(self) -> list[Member]:
        """Layers whose outputs these neurons are: the first, and those added to it by skip connections."""
        return [m for m in self.members if m.outputs and not m.along]

    @property
    def readers(self) -> list[Member]:
        """Layers that take these neurons as inputs."""
        return [m for m in self.members if not m.outputs and not m.along]


@dataclass(frozen=True)
class NeuronMap:
    """All groups of a model, and for every layer without any the reason.

    ``widths``: outputs and inputs of every layer when the model was traced. ``work``: label elements that
    finding the groups looked at. ``unknown``: operations that could not be followed and met neurons, with the
    module that they ran in.
    """

    groups: list[NeuronGroup]
    refused: dict[str, str]
    widths: dict[str, tuple[int, int]]
    work: int = 0
    unknown: dict[str, str] = field(default_factory=dict)

    def fits(self, model: nn.Module) -> bool:
        """Whether the widths of ``model`` are still those that were traced, so that the groups hold."""
        return self.widths == widths_of(model)

    def of(self, name: str) -> list[NeuronGroup]:
        """The groups named after the layer ``name``."""
        return [g for g in self.groups if g.name == name]


def find_groups(model: nn.Module, example: ExampleInputs, *, plain: bool = False) -> NeuronMap:
    """Follow one forward pass and find every group of neurons that some block-sparse layer makes or reads.

    Weights, gradients, buffers, modes and random states stay as they were.

    Args:
        plain: also the groups that plain layers alone make and read.

    Returns:
        Groups, in the order of the layers; in ``refused`` layers whose outputs must not be cut: they are the
        model's outputs, meet something that cannot be cut, or their blocks do not line up.
    """
    graph = trace(model, example)
    groups: list[NeuronGroup] = []
    refused: dict[str, str] = {}
    for makers in _families(graph):
        parts = _parts_of(graph, makers)
        if not plain and not any(isinstance(part.layer.module, BlockSparseLayer) for part in parts):
            continue
        found, reason = _aligned_groups(graph, parts)
        groups.extend(found)
        if not found:
            refused.update(dict.fromkeys((layer.name for layer in makers), reason))
    for name, module in model.named_modules():
        if not (isinstance(module, BlockSparseLayer) or (plain and _has_weights(module))):
            continue
        if name not in graph.layers:
            refused[name] = "its forward is replaced on the instance, and what it does cannot be known"
        elif not graph.layers[name].called:
            refused[name] = "the traced forward pass does not reach it"
    order = {name: place for place, name in enumerate(graph.layers)}
    groups.sort(key=lambda group: (order[group.name], int(group.neurons[0])))
    return NeuronMap(groups, refused, widths_of(model), graph.sets.work, graph.unknown)


def _has_weights(module: nn.Module) -> bool:
    shape = layer_shape(module)
    return shape is not None and shape.in_ > 0


def widths_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every layer that can be cut."""
    shapes = ((name, layer_shape(module)) for name, module in model.named_modules())
    return {name: (shape.out, shape.in_) for name, shape in shapes if shape is not None}


@dataclass(frozen=True)
class _Part:
    """Outputs or inputs of one layer that belong to a family: ``index`` in the layer, number of their set."""

    layer: Layer
    outputs: bool
    along: bool
    index: Tensor
    set: Tensor


def _families(graph: DependencyGraph) -> list[list[Layer]]:
    """Layers that make neurons, in sets whose neurons hang together, in the model's order."""
    makers = [layer for layer in graph.layers.values() if layer.called and not layer.channelwise]
    families = DisjointSets(len(makers))
    owner = torch.full((graph.sets.count,), -1)
    for place, maker in enumerate(makers):
        roots = graph.sets.roots(maker.outputs).unique()
        others = owner[roots]
        families.unite(others[others >= 0], torch.full_like(others[others >= 0], place))
        owner[roots] = place
    found: dict[int, list[Layer]] = {}
    for maker, family in zip(makers, families.roots(torch.arange(len(makers))).tolist(), strict=True):
        found.setdefault(family, []).append(maker)
    return list(found.values())


def _parts_of(graph: DependencyGraph, makers: list[Layer]) -> list[_Part]:
    """Everything that hangs on the outputs of ``makers``: makers, then what goes along, then readers."""
    sets = graph.sets
    wanted = torch.zeros(sets.count, dtype=torch.bool)
    for maker in makers:
        wanted[sets.roots(maker.outputs)] = True
    parts: list[_Part] = []
    for layer in graph.layers.values():
        for outputs, channels in ((True, layer.outputs), (False, layer.inputs)):
            roots = sets.roots(channels)
            for along in (False, True):
                aside = sets.along[channels] if outputs and not layer.channelwise else layer.channelwise
                index = (wanted[roots] & (aside == along)).nonzero().squeeze(1)
                if layer.called and index.numel():
                    parts.append(_Part(layer, outputs, along, index, roots[index]))
    parts.sort(key=lambda part: (not part.outputs, part.along))
    return parts


def _aligned_groups(graph: DependencyGraph, parts: list[_Part]) -> tuple[list[NeuronGroup], str]:
    """Merge sets into the smallest groups that split no block; also a reason where some stay."""
    sets = graph.sets
    known = torch.cat([part.set for part in parts]).unique()
    place = torch.full((sets.count,), -1).index_put_((known,), torch.arange(len(known)))
    closed: dict[int, str] = {}
    made, read = torch.zeros(len(known), dtype=torch.bool), torch.zeros(len(known), dtype=torch.bool)
    for part in parts:
        if not part.along:
            (made if part.outputs else read)[place[part.set]] = True
    blocked = ""
    for number, root in enumerate(known.tolist()):
        if reason := sets.reason(root):
            closed[number] = reason
            blocked = blocked or reason
        elif not read[number]:
            closed[number] = "no layer reads its outputs"
        elif not made[number]:
            closed[number] = "they act through the weights of an attention only"
    merged = DisjointSets(len(known))
    for first, numbers, split in _blocks(parts, place):
        merged.unite(first.expand_as(numbers), numbers)
        if split:
            closed.setdefault(int(first), split)
    shut = {int(merged.roots(torch.tensor(number))) for number in closed}
    reason = blocked or next(iter(closed.values()), "")
    members: dict[int, list[Member]] = {}
    averaged: set[int] = set()
    met = place[sets.roots(sets.scaled.nonzero().squeeze(1))]
    scaled = set(merged.roots(met[met >= 0]).tolist())
    for part in parts:
        groups = merged.roots(place[part.set])
        order = groups.argsort(stable=True)
        leaders, sizes = groups[order].unique_consecutive(return_counts=True)
        for leader, index in zip(leaders.tolist(), part.index[order].split(sizes.tolist()), strict=True):
            if leader in shut:
                continue
            if part.along and not part.layer.channelwise:
                averaged.add(leader)
            members.setdefault(leader, []).append(
                Member(part.layer.name, part.outputs, part.along, index.sort().values)
            )
    found = [NeuronGroup(tuple(m), leader in averaged, leader in scaled) for leader, m in members.items()]
    return found, reason


def _blocks(parts: list[_Part], place: Tensor) -> Iterator[tuple[Tensor, Tensor, str]]:
    """For every block of every block-sparse layer: its first set, all its sets, and what splits it."""
    sides: dict[tuple[str, bool], list[_Part]] = {}
    for part in parts:
        if isinstance(part.layer.module, BlockSparseLayer):
            sides.setdefault((part.layer.name, part.outputs), []).append(part)
    for (name, outputs), sharing in sides.items():
        layout = sharing[0].layer.module.layout
        block = layout.block[0 if outputs else 1]
        width = layout.out_features if outputs else layout.in_features
        index = torch.cat([part.index for part in sharing])
        order = index.argsort()
        numbers, sizes = (index[order] // block).unique_consecutive(return_counts=True)
        sets = place[torch.cat([part.set for part in sharing])[order]]
        for number, inside in zip(numbers.tolist(), sets.split(sizes.tolist()), strict=True):
            split = ""
            if len(inside) < min(block, width - number * block):
                kind = "row" if outputs else "column"
                split = f"block {kind} {number} of {name!r} also holds other neurons"
            yield inside[0], inside, split
