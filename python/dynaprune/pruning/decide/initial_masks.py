"""Which blocks a training that starts sparse begins with: how many in each layer, and which, at random."""

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

INITIAL_ALLOCATIONS = ("uniform", "erk")


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

    @property
    def cover(self) -> int:
        """Least number of blocks with one in every block row and in every block of input channels."""
        rows, columns = self.weights.shape
        return self.groups * max(rows // self.groups, columns // self.taps)


def initial_masks(
    grids: Mapping[str, Grid],
    sparsity: float,
    *,
    allocation: str = "uniform",
    floors: Mapping[str, float] | None = None,
    seed: int = 0,
    orders: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks that leave out ``sparsity`` of all weights, and as little more as whole blocks allow.

    Every block row and every block of input channels keeps a block. Layers where that takes more than their
    share are made up for by the others. The masks of a layer depend on its name, on the seed and on the sizes
    of all layers, not on the order of ``grids``.

    Args:
        allocation: "uniform": the same share of the blocks of every layer. "erk": a share in proportion to
            sum(shape) / prod(shape), at most 1 (Evci et al. 2020, arXiv:1911.11134, section 3 (1)).
        floors: least share of a layer's blocks that it begins with, by layer.
        orders: by layer, int64 ``[blocks]``, all block numbers in the order in which a layer keeps them; at
            random by default (see :func:`random_order`). The first ``cover`` of each have to cover it.

    Returns:
        Bool ``[rows, columns]`` on the host by layer, in the order of ``grids``.

    Raises:
        ValueError: a sparsity that leaves no layer its rows, columns and floors; it says what is possible.
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
    orders: Mapping[str, Tensor],
) -> dict[str, int]:
    """How many blocks each layer keeps: the most that leave out ``sparsity`` of all weights."""
    names = sorted(grids)
    blocks = [grids[name].blocks for name in names]
    least = [max(grids[n].cover, math.ceil(floors.get(n, 0.0) * grids[n].blocks - 1e-9)) for n in names]
    may_go = [whole - few for whole, few in zip(blocks, least, strict=True)]
    wanted = [grids[name].blocks * _share(grids[name].shape, allocation) for name in names]
    summed = [grids[name].weights.reshape(-1)[orders[name]].cumsum(0) for name in names]
    total = sum(float(weights[-1]) for weights in summed)
    budget = (1 - sparsity + 1e-9) * total

    def kept(gone: int) -> list[int]:
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


def random_order(grid: Grid, seed: str) -> Tensor:
    """All block numbers: first a random cover of rows and channel blocks, then the rest in random order."""
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
    return keys.reshape(-1).argsort(stable=True)


def _share(shape: tuple[int, ...], allocation: str) -> float:
    return 1.0 if allocation == "uniform" else sum(shape) / math.prod(shape)


def _mask(grid: Grid, order: Tensor, count: int) -> Tensor:
    mask = torch.zeros(grid.blocks, dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(grid.weights.shape)
