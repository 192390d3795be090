"""Which blocks a training that starts sparse begins with: how many in each layer, and which, at random or by
their scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynaprune.nn.shape import layout_weights
from dynaprune.pruning.decide.allocation import quotas
from dynaprune_kernels import BlockLayout

INITIAL_ALLOCATIONS = ("uniform", "erk", "global")


@dataclass(frozen=True, eq=False)
class Grid:
    """The blocks of one weight.

    Attributes:
        shape: of the dense weight.
        weights: float64 ``[rows, columns]`` on the host, weights in each block.
        taps, groups: of a convolution; columns are ordered by tap, then by block of input channels.
    """

    shape: tuple[int, ...]
    weights: Tensor
    taps: int
    groups: int

    @classmethod
    def of(cls, layout: BlockLayout) -> Grid:
        """The grid of a layout."""
        return cls(tuple(layout.dense_shape), layout_weights(layout).cpu(), layout.taps, layout.groups)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.weights.numel()


@dataclass(frozen=True, eq=False)
class Order:
    """The order in which a layer keeps its blocks.

    Attributes:
        blocks: int64 ``[blocks]``, all block numbers, the most wanted first.
        cover: so many of them come first because they cover every block row, and every block of input
            channels.
        scores: float64 ``[blocks]`` in that order, what blocks of several layers are compared by; None where
            the order is random.
    """

    blocks: Tensor
    cover: int
    scores: Tensor | None = None


def initial_masks(
    grids: Mapping[str, Grid],
    sparsity: float,
    *,
    allocation: str = "uniform",
    floors: Mapping[str, float] | None = None,
    seed: int = 0,
    orders: Mapping[str, Order] | None = None,
) -> dict[str, Tensor]:
    """Masks that leave out ``sparsity`` of all weights, and as little more as whole blocks allow.

    Every block row and every block of input channels keeps a block. Layers where that takes more than their
    share are made up for by the others. The masks of a layer depend on its name, on the seed and on the sizes
    of all layers, not on the order of ``grids``.

    Args:
        allocation: "uniform": the same share of the blocks of every layer. "erk": a share in proportion to
            sum(shape) / prod(shape), at most 1 (Evci et al. 2020, arXiv:1911.11134, section 3 (1)). "global":
            the blocks of the highest scores, of all layers together.
        floors: least share of a layer's blocks that it begins with, by layer.
        orders: by layer; at random by default (see :func:`random_order`).

    Returns:
        Bool ``[rows, columns]`` on the host by layer, in the order of ``grids``.

    Raises:
        ValueError: a sparsity that leaves no layer its rows, columns and floors; it says what is possible.
            Or "global" without scores.
    """
    if orders is None:
        orders = {name: random_order(grid, f"{seed}:{name}") for name, grid in grids.items()}
    counts = _counts(grids, sparsity, allocation, floors or {}, orders)
    return {name: _mask(grid, orders[name], counts[name]) for name, grid in grids.items()}


def _counts(
    grids: Mapping[str, Grid],
    sparsity: float,
    allocation: str,
    floors: Mapping[str, float],
    orders: Mapping[str, Order],
) -> dict[str, int]:
    """How many blocks each layer keeps: the most that leave out ``sparsity`` of all weights."""
    names = sorted(grids)
    blocks = [grids[name].blocks for name in names]
    least = [max(orders[n].cover, math.ceil(floors.get(n, 0.0) * grids[n].blocks - 1e-9)) for n in names]
    may_go = [whole - few for whole, few in zip(blocks, least, strict=True)]
    summed = [grids[name].weights.reshape(-1)[orders[name].blocks].cumsum(0) for name in names]
    total = sum(float(weights[-1]) for weights in summed)
    budget = (1 - sparsity + 1e-9) * total

    if allocation == "global":
        first_to_go = _lowest([orders[name] for name in names], least)
    else:
        wanted = [grids[name].blocks * _share(grids[name].shape, allocation) for name in names]

    def kept(gone: int) -> list[int]:
        if allocation == "global":
            lost = torch.bincount(first_to_go[:gone], minlength=len(names)).tolist()
        else:
            lost = quotas(blocks, may_go, wanted, gone)
        return [whole - less for whole, less in zip(blocks, lost, strict=True)]

    def left(gone: int) -> float:
        return sum(float(each[count - 1]) for each, count in zip(summed, kept(gone), strict=True))

    few, many = 0, sum(may_go)
    if (rest := left(many)) > budget:
        raise ValueError(
            f"expected an initial_sparsity of at most {1 - rest / total:.4f}, at which every block row, "
            f"every block column and every floor is kept, got {sparsity}: lower it or the floors, or take a "
            "smaller block_size"
        )
    while few < many:
        middle = (few + many) // 2
        few, many = (middle + 1, many) if left(middle) > budget else (few, middle)
    return dict(zip(names, kept(many), strict=True))


def _lowest(orders: list[Order], least: list[int]) -> Tensor:
    """Of all blocks that may go the numbers of their layers, the lowest score first: int64."""
    scores, layers = [], []
    for number, (order, few) in enumerate(zip(orders, least, strict=True)):
        if order.scores is None:
            raise ValueError(
                "expected an initial_allocation of 'uniform' or 'erk' for random blocks, got 'global': it "
                "compares the scores of a calibration"
            )
        scores.append(order.scores[few:])
        layers.append(torch.full((len(scores[-1]),), number))
    return torch.cat(layers)[torch.cat(scores).argsort(stable=True)]


def random_order(grid: Grid, seed: str) -> Order:
    """First a random cover of rows and channel blocks, as small as can be, then the rest in random order."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    rows, columns = grid.weights.shape
    keys = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    height, width = rows // grid.groups, columns // grid.taps
    for group in range(grid.groups):
        count = torch.arange(max(height, width))
        row = torch.randperm(height, generator=generator)[count % height] + group * height
        column = torch.randperm(width, generator=generator)[count % width]
        tap = torch.randint(grid.taps, (len(count),), generator=generator)
        keys[row, tap * width + column] -= 1
    return Order(keys.reshape(-1).argsort(stable=True), grid.groups * max(height, width))


def scored_order(grid: Grid, scores: Tensor) -> Order:
    """First the best block of each row, then that of each block of input channels without one, then the rest
    by score.

    Args:
        scores: float64 ``[rows, columns]``, higher = keep.
    """
    rows, columns = grid.weights.shape
    height, width = rows // grid.groups, columns // grid.taps
    first = torch.zeros(rows, columns, dtype=torch.bool)
    first[torch.arange(rows), scores.argmax(1)] = True
    # [groups, channel blocks, rows of a group and taps]: what reads one block of input channels
    by_input = scores.view(grid.groups, height, grid.taps, width).permute(0, 3, 1, 2).flatten(2)
    covered = first.view(grid.groups, height, grid.taps, width).permute(0, 3, 1, 2).flatten(2).any(2)
    for group, column in (~covered).nonzero().tolist():
        row, tap = divmod(int(by_input[group, column].argmax()), grid.taps)
        first[group * height + row, tap * width + column] = True
    flat, ahead = scores.reshape(-1), first.reshape(-1)
    by_score = flat.argsort(descending=True, stable=True)
    blocks = by_score[(~ahead[by_score]).to(torch.uint8).argsort(stable=True)]
    return Order(blocks, int(first.sum()), flat[blocks])


def _share(shape: tuple[int, ...], allocation: str) -> float:
    return 1.0 if allocation == "uniform" else sum(shape) / math.prod(shape)


def _mask(grid: Grid, order: Order, count: int) -> Tensor:
    mask = torch.zeros(grid.blocks, dtype=torch.bool)
    mask[order.blocks[:count]] = True
    return mask.view(grid.weights.shape)
