"""Which neurons hang together: groups that can be cut out of a network without splitting a block.

Torch-Pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) follows
a neuron from the layer that makes it through norms, activations, skip connections, splits and flattenings to
all layers that read it. The graph is asked once and dropped (it holds an autograd graph); plain data is kept.

A block-sparse layer loses whole block rows or block columns only, so neurons are merged until every block of
every layer is wholly inside or outside a group: with ``bo = 32`` before ``bi = 64`` a group is 64 neurons.

The outputs of an attention's projections are merged into whole heads (``attention_heads``): the graph takes
attention for an element-wise product, and part of a head cannot go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from dynaprune.manifest import layer_shape
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.attention_heads import Attention, find_attentions
from dynaprune.pruning.dependency_graph import trace
from dynaprune.pruning.example_inputs import ExampleInputs
from dynaprune.pruning.surgery import cannot_cut, is_channelwise

_PASSIVE = {
    ops.OPTYPE.CONCAT,
    ops.OPTYPE.SPLIT,
    ops.OPTYPE.ELEMENTWISE,
    ops.OPTYPE.RESHAPE,
    ops.OPTYPE.UNBIND,
    ops.OPTYPE.EXPAND,
    ops.OPTYPE.SLICE,
}


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
    readers with the rounding of that average.
    """

    members: tuple[Member, ...]
    averaged: bool = False

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

    ``widths``: outputs and inputs of every layer when the model was traced.
    """

    groups: list[NeuronGroup]
    refused: dict[str, str]
    widths: dict[str, tuple[int, int]]

    def fits(self, model: nn.Module) -> bool:
        """Whether the widths of ``model`` are still those that were traced, so that the groups hold."""
        return self.widths == widths_of(model)

    def of(self, name: str) -> list[NeuronGroup]:
        """The groups named after the layer ``name``."""
        return [g for g in self.groups if g.name == name]


def find_groups(model: nn.Module, example: ExampleInputs) -> NeuronMap:
    """Trace one forward pass and find every group of neurons that some block-sparse layer makes or reads.

    Weights, gradients, buffers, modes and random states stay as they were.

    Returns:
        Groups, in the order of the layers; in ``refused`` layers whose outputs must not be cut: they are the
        model's outputs, meet something that cannot be cut, or their blocks do not line up.
    """
    names = {id(module): name for name, module in model.named_modules()}
    tied = _tied_modules(model)
    graph = trace(model, example)
    attentions = {each.value: each for each in find_attentions(model)}
    aside = {layer for each in attentions.values() for layer in (each.query, each.key)}
    groups: list[NeuronGroup] = []
    refused: dict[str, str] = {}
    seen: set[str] = set()
    for name, module in model.named_modules():
        if name in seen | aside or module not in graph.module2node or not _makes_neurons(module):
            continue
        items = _group_items(graph, module)
        makers = [names[id(m)] for m, outputs, _ in items if id(m) in names and outputs and _makes_neurons(m)]
        attention = attentions.get(name)
        if attention is not None:
            makers = list(attention.projections)
        seen.update(makers)
        if not any(isinstance(m, BlockSparseLayer) for m, _, _ in items):
            continue
        if reason := _cannot_cut_any(items, names, tied):
            refused.update(dict.fromkeys(makers, reason))
            continue
        if attention is None:
            found, reason = _aligned_groups(items, names)
        else:
            found, reason = _head_groups(model, attention, {names[id(m)] for m, _, _ in items})
        groups.extend(found)
        if not found:
            refused.update(dict.fromkeys(makers, reason))
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLayer) and name not in seen:
            refused[name] = "the traced forward pass does not reach it"
    return NeuronMap(groups, refused, widths_of(model))


def widths_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every layer that can be cut."""
    shapes = ((name, layer_shape(module)) for name, module in model.named_modules())
    return {name: (shape.out, shape.in_) for name, shape in shapes if shape is not None}


_Item = tuple[Any, bool, Tensor]


def _makes_neurons(module: nn.Module) -> bool:
    convolution = isinstance(module, nn.modules.conv._ConvNd) and not is_channelwise(module)
    return isinstance(module, (BlockSparseLayer, nn.Linear)) or convolution


def _tied_modules(model: nn.Module) -> set[int]:
    """Modules with a Parameter that another module holds too."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return {module for held in holders.values() if len(held) > 1 for module in held}


def _group_items(graph: Any, module: nn.Module) -> list[_Item]:
    """``(module, whether its outputs, which)`` for everything that all outputs of ``module`` touch.

    ``which`` is int64 ``[2, n]``: the index in that module, and the output of ``module`` that it belongs to.
    """
    pruner = graph.get_pruner_of_module(module)
    width = pruner.get_out_channels(module)
    group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))
    items: list[_Item] = []
    for item in group:
        outputs = graph.is_out_channel_pruning_fn(item.dep.handler)
        target = item.dep.target
        if target.type in _PASSIVE:
            continue
        items.append((target.module, outputs, torch.tensor([item.idxs, item.root_idxs], dtype=torch.int64)))
    return items


def _cannot_cut_any(items: list[_Item], names: Mapping[int, str], tied: set[int]) -> str:
    for module, outputs, (index, _) in items:
        if isinstance(module, ops._OutputOp):
            return "its outputs are outputs of the model"
        if isinstance(module, nn.Parameter):
            return "its outputs meet a parameter that is no layer's"
        if id(module) in tied:
            return f"{names[id(module)]!r} shares a weight with another layer"
        if why := cannot_cut(module):
            return f"{names.get(id(module), type(module).__name__)!r} is in the way: {why}"
        shape = layer_shape(module)
        width = 0 if shape is None else shape.out if outputs or not shape.in_ else shape.in_
        if int(index.max()) >= width:
            return f"it could not be traced to {names[id(module)]!r}, which is {width} wide"
    if not any(not outputs and not is_channelwise(module) for module, outputs, _ in items):
        return "no layer reads its outputs"
    return ""


def _blocks_of(module: nn.Module, outputs: bool) -> tuple[int, int]:
    """Elements per block and elements in all, along the outputs or inputs of a block-sparse layer."""
    layout: Any = module.layout
    return (layout.block[0], layout.out_features) if outputs else (layout.block[1], layout.in_features)


def _aligned_groups(items: list[_Item], names: Mapping[int, str]) -> tuple[list[NeuronGroup], str]:
    """Merge the neurons of the first item's module into the smallest sets that split no layer's block."""
    width = int(items[0][2].shape[1])
    parent = list(range(width))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    split: dict[int, str] = {}
    for module, outputs, (index, root) in items:
        if not isinstance(module, BlockSparseLayer):
            continue
        block, size = _blocks_of(module, outputs)
        for number, neurons in _by_block(index, root, block).items():
            first = find(neurons[0])
            for other in neurons[1:]:
                parent[find(other)] = first
            covered = int((index // block == number).sum())
            if covered < min(block, size - number * block):
                kind = "row" if outputs else "column"
                split[neurons[0]] = f"block {kind} {number} of {names[id(module)]!r} also holds other neurons"
    closed = {find(i): why for i, why in split.items()}
    roots = torch.tensor([find(i) for i in range(width)])
    groups = []
    for leader in roots.unique(sorted=False).tolist() if len(closed) < width else []:
        if leader in closed:
            continue
        members = []
        for module, outputs, (index, root) in items:
            chosen = index[roots[root] == leader].sort().values
            if chosen.numel():
                members.append(Member(names[id(module)], outputs, is_channelwise(module), chosen))
        groups.append(NeuronGroup(_once(members)))
    groups.sort(key=lambda g: int(g.neurons[0]))
    return groups, next(iter(closed.values()), "")


def _head_groups(model: nn.Module, attention: Attention, met: set[str]) -> tuple[list[NeuronGroup], str]:
    """Whole heads of ``attention``; ``met``: the layers that the traced graph finds on both sides of it."""
    if others := met - {*attention.projections, attention.output}:
        return [], f"the heads of {attention.name!r} also meet {', '.join(sorted(others))}"
    groups = []
    for span in attention.spans(model):
        makers = [Member(each, True, each != attention.value, span) for each in attention.projections]
        groups.append(NeuronGroup((*makers, Member(attention.output, False, False, span)), averaged=True))
    return groups, ""


def _by_block(index: Tensor, root: Tensor, block: int) -> dict[int, list[int]]:
    """Neurons by the block that they are in."""
    found: dict[int, list[int]] = {}
    for number, neuron in zip((index // block).tolist(), root.tolist(), strict=True):
        found.setdefault(number, []).append(neuron)
    return found


def _once(members: list[Member]) -> tuple[Member, ...]:
    """A channel-wise layer appears as maker and as reader of the same channels; keep it once."""
    kept: list[Member] = []
    for member in members:
        same = (m for m in kept if m.name == member.name)
        if not (member.along and any(torch.equal(m.index, member.index) for m in same)):
            kept.append(member)
    return tuple(kept)
