"""Whole neurons before single blocks, where they cost no more: what a trial then tries as a whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dynaprune.neurons.candidates import blocks_of_group
from dynaprune.neurons.groups import Member, NeuronGroup, NeuronMap
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape
from dynaprune.pruning.decide.allocation import Selection

SHARE = 0.5


@dataclass(frozen=True)
class GroupFigures:
    """What the order of whole neurons goes by.

    Attributes:
        scores: one per group of the map, higher = keep, in units of a block's score: what removing the group
            is said to cost. None where unknown: the sum of the scores of its blocks then stands for it.
        neurons: float ``[out]`` by layer for a score that is not made of gates: groups are ranked by the sum
            over their producers' rows, and ``scores`` is not read. None otherwise.
        tokens: tokens (output positions of a convolution) that each layer sees in a step; 1 where missing.
    """

    scores: Sequence[float | None]
    neurons: Mapping[str, Tensor] | None
    tokens: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class NeuronFigures:
    """The groups of neurons of a model as it is now, and what they are ranked by."""

    model: nn.Module
    neuron_map: NeuronMap
    figures: GroupFigures


def whole_neurons_first(
    neurons: NeuronFigures,
    selection: Selection,
    scores: Mapping[str, Tensor],
    may_go: Mapping[str, Tensor],
    removable: Mapping[str, int],
) -> Selection:
    """Put the blocks of whole groups of neurons in front of ``selection``, for at most half of its units.

    A group is taken where it costs, per live block, no more than the last block of the selection. Among these
    the ones that cost least per FLOP saved go first. A prefix of the new order that a trial accepts holds
    whole groups, which then are dead and get cut. Groups that a plain layer makes and another reads never
    die, and are left out.

    Args:
        scores: float ``[rows, columns]`` by layer, higher = keep.
        may_go: bool ``[rows, columns]``: live blocks that are not protected.
        removable: blocks that each layer may lose.

    Returns:
        As many units as before; the selection itself where no group qualifies or a floor would be broken.
    """
    model = neurons.model
    names = list(selection.shapes)
    order = selection.order.cpu()
    if not len(order):
        return selection
    flat = torch.cat([scores[name].detach().reshape(-1).double().cpu() for name in names])
    free = torch.cat([may_go[name].reshape(-1).cpu() for name in names])
    masks = [block_sparse_layer(model, name).layout.mask for name in names]
    live = torch.cat([mask.reshape(-1).cpu() for mask in masks])
    margin = float(flat[order[-1]])
    sizes = [selection.shapes[name].numel() for name in names]
    starts = dict(zip(names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    ranked: list[tuple[float, Tensor]] = []
    for number, group in enumerate(neurons.neuron_map.groups):
        units = _units(model, group, starts)
        units = units[live[units]] if units is not None else None
        if units is None or not len(units) or not bool(free[units].all()) or not _can_die(model, group):
            continue
        rank, cost = _rank_and_cost(group, number, neurons.figures, float(flat[units].sum()))
        if cost <= margin * len(units):
            saved = flops_saved(model, group, neurons.figures.tokens)
            ranked.append((rank * saved if rank < 0 else rank / saved, units))
    ranked.sort(key=lambda each: each[0])
    chosen = torch.zeros_like(free)
    first: list[Tensor] = []
    for _, units in ranked:
        new = units[~chosen[units]]
        if int(chosen.sum()) + len(new) <= SHARE * len(order):
            chosen[new] = True
            first.append(new)
    if not first:
        return selection
    reordered = torch.cat([*first, order[~chosen[order]]])[: len(order)]
    lost = Counter(torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes))[reordered].tolist())
    if any(lost[i] > removable[name] for i, name in enumerate(names)):
        return selection
    return replace(selection, order=reordered.to(selection.order.device))


def _rank_and_cost(
    group: NeuronGroup, number: int, figures: GroupFigures, of_blocks: float
) -> tuple[float, float]:
    """What the group is ranked by, and what removing it is said to cost, in units of a block's score."""
    if figures.neurons is not None:
        return _row_score(group, figures.neurons), of_blocks
    known = figures.scores[number]
    cost = of_blocks if known is None else known
    return cost, cost


def flops_saved(model: nn.Module, group: NeuronGroup, tokens: Mapping[str, int]) -> float:
    """FLOPs of a training step that go with the group: of its producers' rows and its readers' columns.

    Six per live weight and token (forward, input gradient, weight gradient). What goes along (norms,
    depthwise convolutions, an attention's queries) is not counted.

    Args:
        tokens: as in :class:`GroupFigures`.
    """
    masks = blocks_of_group(model, group)
    total = 0.0
    for name in dict.fromkeys(m.name for m in (*group.producers, *group.readers)):
        layer = model.get_submodule(name)
        if isinstance(layer, BlockSparseLayer):
            weights = int((masks[name] & layer.layout.mask).sum()) * math.prod(layer.layout.block)
        else:
            weights = _plain_weights(layer, [m for m in group.members if m.name == name and not m.along])
        total += 6.0 * weights * max(tokens.get(name, 1), 1)
    return max(total, 1.0)


def _plain_weights(layer: nn.Module, members: list[Member]) -> int:
    shape = layer_shape(layer)
    assert shape is not None
    taps = math.prod(getattr(layer, "kernel_size", ()))
    out = sum(m.index.numel() for m in members if m.outputs)
    in_ = sum(m.index.numel() for m in members if not m.outputs)
    return taps * (shape.out * shape.in_ - (shape.out - out) * (shape.in_ - in_)) // shape.groups


def _can_die(model: nn.Module, group: NeuronGroup) -> bool:
    """Whether all producers, or all readers, are block-sparse: only their weights can be dead."""
    return any(
        all(isinstance(model.get_submodule(m.name), BlockSparseLayer) for m in side)
        for side in (group.producers, group.readers)
    )


def block_sparse_layer(model: nn.Module, name: str) -> BlockSparseLayer:
    """The block-sparse layer of that name; TypeError for another kind."""
    layer = model.get_submodule(name)
    if not isinstance(layer, BlockSparseLayer):
        raise TypeError(f"expected {name} to be a block-sparse layer, got {type(layer).__name__}")
    return layer


def _units(model: nn.Module, group: NeuronGroup, starts: Mapping[str, int]) -> Tensor | None:
    """Unit numbers of the group's blocks; None where a layer of it is not pruned."""
    masks = blocks_of_group(model, group)
    if not all(name in starts for name in masks):
        return None
    return torch.cat(
        [mask.reshape(-1).cpu().nonzero().squeeze(1) + starts[name] for name, mask in masks.items()]
    )


def _row_score(group: NeuronGroup, neuron_scores: Mapping[str, Tensor]) -> float:
    scored = [m for m in group.producers if m.name in neuron_scores]
    return sum(float(neuron_scores[m.name].cpu()[m.index].double().sum()) for m in scored)
