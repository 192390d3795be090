"""Which blocks of a layer change places: those that may go, those that go, and where others begin."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from dynaprune.pruning.decide.allocation import Selection


def droppable(scores: Tensor, live: Tensor, protected: Tensor) -> Tensor:
    """Live blocks that may go: none that is protected, and of every block row all but the best.

    So that every row keeps a live block. Of equal scores in a row the last stays.

    Args:
        scores: float ``[rows, columns]``, higher = keep; NaN counts as infinite.
        live, protected: bool ``[rows, columns]``.

    Returns:
        Bool ``[rows, columns]``.
    """
    order = _ascending(scores, live)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device)
    rank = torch.where(live, rank.view_as(live), -1)
    best = rank.max(1, keepdim=True).values
    return live & ~protected & (rank < best)


def least(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` blocks of the lowest scores ``among`` the blocks given: bool ``[rows, columns]``.

    Ties go by block number; NaN comes last.
    """
    return _first(_ascending(scores, among), among, count)


def largest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` blocks of the largest values ``among`` the blocks given; ties go by block number."""
    wanted = torch.where(among, values, -torch.inf).reshape(-1)
    return _first(torch.sort(wanted, descending=True, stable=True).indices, among, count)


def spread(scores: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> Selection:
    """The ``chosen`` blocks of all layers in one order, of which any prefix has about the same share of each
    layer's, the lowest scores first.

    Args:
        scores: float ``[rows, columns]`` by layer. chosen: bool of the same shapes.
    """
    numbers, keys, before = [], [], 0
    for name, mask in chosen.items():
        count = int(mask.sum())
        numbers.append(_ascending(scores[name], mask)[:count].cpu() + before)
        keys.append((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1))
        before += mask.numel()
    order = torch.cat(numbers)[torch.cat(keys).argsort(stable=True)]
    shapes = {name: mask.shape for name, mask in chosen.items()}
    return Selection(order, shapes, {name: mask.device for name, mask in chosen.items()})


def random_keys(shape: torch.Size, seed: int, step: int, name: str) -> Tensor:
    """Uniform float64 numbers of a shape, on the CPU, by seed, step and layer: the order of layers and the
    random state of torch change nothing."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/rewire/{step}/{name}".encode()))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _ascending(scores: Tensor, among: Tensor) -> Tensor:
    """Block numbers: those ``among`` the given ones by score, then all others."""
    scores = scores.masked_fill(scores.isnan(), torch.inf).reshape(-1)
    by_score = torch.sort(scores, stable=True).indices
    return by_score[torch.sort((~among.reshape(-1)[by_score]).to(torch.uint8), stable=True).indices]


def _first(order: Tensor, among: Tensor, count: int) -> Tensor:
    chosen = torch.zeros_like(among)
    chosen.view(-1)[order[:count]] = True
    return chosen & among
