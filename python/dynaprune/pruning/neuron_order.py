"""Whole neurons before single blocks, where they score no more: what a trial then tries as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.allocation import Selection
from dynaprune.pruning.neuron_groups import NeuronGroup, NeuronMap
from dynaprune.pruning.neurons import blocks_of_group

SHARE = 0.5


def whole_neurons_first(
    model: nn.Module,
    selection: Selection,
    neuron_map: NeuronMap,
    scores: Mapping[str, Tensor],
    neuron_scores: Mapping[str, Tensor],
    may_go: Mapping[str, Tensor],
    removable: Mapping[str, int],
) -> Selection:
    """Put the blocks of whole groups of neurons in front of ``selection``, for at most half of its units.

    A group is taken where its live blocks score, on average, no more than the last block of the selection.
    Among these the ones with the least neuron score per block go first. A prefix of the new order that a
    trial accepts holds whole groups, which then are dead and get cut.

    Args:
        scores: float ``[rows, columns]`` by layer, higher = keep. neuron_scores: float ``[out]``, likewise.
        may_go: bool ``[rows, columns]``: live blocks that are not protected.
        removable: blocks that each layer may lose.

    Returns:
        As many units as before; the selection itself where no group qualifies or a floor would be broken.
    """
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
    for group in neuron_map.groups:
        units = _units(model, group, starts)
        units = units[live[units]] if units is not None else None
        if units is None or not len(units) or not bool(free[units].all()):
            continue
        if float(flat[units].mean()) <= margin:
            ranked.append((_neuron_score(group, neuron_scores) / len(units), units))
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
    layer = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes))[reordered]
    lost = Counter(layer.tolist())
    if any(lost[i] > removable[name] for i, name in enumerate(names)):
        return selection
    return replace(selection, order=reordered.to(selection.order.device))


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


def _neuron_score(group: NeuronGroup, neuron_scores: Mapping[str, Tensor]) -> float:
    scored = [m for m in group.producers if m.name in neuron_scores]
    return sum(float(neuron_scores[m.name].cpu()[m.index].double().sum()) for m in scored)
