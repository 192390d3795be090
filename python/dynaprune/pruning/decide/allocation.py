"""Allocation: which units go first across layers, under each layer's floor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALLOCATIONS = ("global", "uniform", "erk")


@dataclass(frozen=True)
class Selection:
    """Units in the order in which they should go; the masks of any prefix stay on their layers' devices.

    Attributes:
        order: int64 ``[count]``, unit numbers over all layers put one behind the other.
        shapes: mask shape of each layer, in layer order.
    """

    order: Tensor
    shapes: Mapping[str, torch.Size]
    devices: Mapping[str, torch.device]

    def __len__(self) -> int:
        return self.order.shape[0]

    def first(self, count: int) -> dict[str, Tensor]:
        """Masks of the first ``count`` units to go (fewer if there are not as many): bool for every layer."""
        if count < 0:
            raise ValueError(f"expected a count of at least 0 units, got {count}")
        sizes = [shape.numel() for shape in self.shapes.values()]
        chosen = torch.zeros(sum(sizes), dtype=torch.bool, device=self.order.device)
        chosen[self.order[:count]] = True
        parts = zip(self.shapes.items(), chosen.split(sizes), strict=True)
        return {name: part.view(shape).to(self.devices[name]) for (name, shape), part in parts}


def select(
    scores: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    count: int,
    *,
    allocation: str = "global",
    floors: float | Mapping[str, float] = 0.0,
    original: Mapping[str, tuple[int, ...]] | None = None,
    cost: Mapping[str, float] | None = None,
    protected: Mapping[str, Tensor] | None = None,
) -> Selection:
    """Choose ``count`` live units to remove, the least wanted first.

    Ties go by layer order, then by unit number. Units whose score is NaN go last. Reads one small tensor back
    from the device, nothing else.

    Args:
        scores: per layer, float of any shape, higher = keep; read where live.
        live: bool of the same shapes.
        allocation: "global" compares scores of all layers as they are. "uniform" (the same density in every
            layer) and "erk" (density in proportion to sum(shape) / prod(shape), Evci et al. 2020,
            arXiv:1911.11134, section 3) fix how many units each layer loses; scores decide within the layer,
            and any prefix is spread the same way.
        floors: least share of a layer's units that stay live, one for all or by layer (0 where missing); at
            least one unit always stays.
        original: shape of each layer's dense weight at the start; needed by "uniform" and "erk".
        cost: FLOPs that removing one unit of the layer saves; "global" then ranks by score per FLOP.
        protected: bool per layer, live units that must not go yet.

    Returns:
        As many units as asked for, or all that floors and protection leave.

    Raises:
        TypeError, ValueError: layers or shapes that differ between the arguments, values out of range.
    """
    _check(scores, live, count, allocation, floors, original, cost, protected)
    flat = _Flat.of(scores, live, protected or {})
    removable = flat.removable(floors)
    count = min(count, sum(removable))
    values, quota = flat.scores, removable
    if allocation == "global":
        if cost is not None:
            saved = flat.by_layer([float(cost[name]) for name in scores], values.dtype)
            values = torch.where(values < 0, values * saved, values / saved)
    else:
        assert original is not None
        weights = [_weight(original[name], allocation) for name in scores]
        quota = quotas(flat.live_counts, removable, weights, count)
    return Selection(
        flat.order(values, quota, count, by_rank=allocation != "global"), flat.shapes, flat.devices
    )


@dataclass(frozen=True, eq=False)
class _Flat:
    """Units of all layers one behind the other, on the first layer's device.

    Attributes:
        scores: float ``[units]``. free: bool ``[units]``, may go. layer: int64 ``[units]``, its number.
        live_counts, free_counts: units of each layer.
    """

    scores: Tensor
    free: Tensor
    layer: Tensor
    live_counts: list[int]
    free_counts: list[int]
    shapes: dict[str, torch.Size]
    devices: dict[str, torch.device]

    @classmethod
    def of(
        cls, scores: Mapping[str, Tensor], live: Mapping[str, Tensor], protected: Mapping[str, Tensor]
    ) -> _Flat:
        """Reads the numbers of units back from the device, nothing else."""
        names = list(scores)
        device = scores[names[0]].device
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in scores.values()) else torch.float32
        flat_scores = torch.cat([scores[name].detach().reshape(-1).to(device, dtype) for name in names])
        flat_live = torch.cat([live[name].reshape(-1).to(device) for name in names])
        hidden = {name: protected.get(name, torch.zeros_like(live[name])) for name in names}
        free = flat_live & ~torch.cat([hidden[name].reshape(-1).to(device) for name in names])
        sizes = torch.tensor([scores[name].numel() for name in names], device=device)
        numbers = torch.arange(len(names), device=device)
        layer = torch.repeat_interleave(numbers, sizes, output_size=flat_scores.shape[0])
        both = torch.stack([flat_live, free]).to(torch.int64)
        counts = torch.zeros(2, len(names), dtype=torch.int64, device=device).index_add_(1, layer, both)
        live_counts, free_counts = counts.tolist()
        shapes = {name: scores[name].shape for name in names}
        devices = {name: scores[name].device for name in names}
        return cls(flat_scores, free, layer, live_counts, free_counts, shapes, devices)

    def by_layer(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        """A value per layer as one per unit."""
        return torch.tensor(values, dtype=dtype, device=self.layer.device)[self.layer]

    def removable(self, floors: float | Mapping[str, float]) -> list[int]:
        """Units that each layer may lose."""
        found = []
        for (name, shape), live, free in zip(
            self.shapes.items(), self.live_counts, self.free_counts, strict=True
        ):
            share = floors.get(name, 0.0) if isinstance(floors, Mapping) else floors
            floor = max(1, math.ceil(share * shape.numel() - 1e-9))
            found.append(max(0, min(free, live - floor)))
        return found

    def order(self, scores: Tensor, quota: list[int], count: int, *, by_rank: bool) -> Tensor:
        """Numbers of the ``count`` units to go, each layer losing up to its quota: int64 ``[count]``.

        Args:
            by_rank: spread any prefix over the layers as their quotas say, instead of comparing scores.
        """
        scores = torch.where(torch.isnan(scores), torch.inf, scores)
        ascending = _sorted_within(scores, self.free, self.layer)
        sizes = torch.tensor([shape.numel() for shape in self.shapes.values()], device=scores.device)
        first = torch.cumsum(torch.cat([sizes.new_zeros(1), sizes[:-1]]), 0)
        rank = torch.empty_like(ascending)
        rank[ascending] = torch.arange(ascending.shape[0], device=scores.device)
        rank -= first[self.layer]
        quotas = self.by_layer(quota, torch.int64)
        may_go = self.free & (rank < quotas)
        key = (rank + 1).to(torch.float64) / quotas.clamp(min=1) if by_rank else scores
        by_key = torch.sort(key, stable=True).indices
        return by_key[torch.sort((~may_go[by_key]).to(torch.uint8), stable=True).indices][:count]


def _sorted_within(scores: Tensor, free: Tensor, layer: Tensor) -> Tensor:
    """Unit numbers ordered by layer, then free ones first, then by score, then by number."""
    order = torch.sort(scores, stable=True).indices
    order = order[torch.sort((~free[order]).to(torch.uint8), stable=True).indices]
    return order[torch.sort(layer[order], stable=True).indices]


def _weight(shape: tuple[int, ...], allocation: str) -> float:
    """What a layer's number of live units is proportional to: its weights, or for ERK the sum of its
    dimensions."""
    return float(math.prod(shape) if allocation == "uniform" else sum(shape))


def quotas(live: list[int], removable: list[int], weights: list[float], count: int) -> list[int]:
    """How many units each layer loses so that what stays is proportional to ``weights``, ``count`` in all.

    A layer cannot hold more than lives now, which is the clipping of ERK at density 1, nor less than its
    floor.
    """

    def losses(scale: float) -> list[float]:
        return [
            min(may, max(0.0, lives - scale * weight))
            for lives, may, weight in zip(live, removable, weights, strict=True)
        ]

    low, high = 0.0, max(lives / weight for lives, weight in zip(live, weights, strict=True))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(losses(middle)) > count else (low, middle)
    exact = losses(high)
    found = [math.floor(loss) for loss in exact]
    by_remainder = sorted(range(len(live)), key=lambda i: (found[i] - exact[i], i))
    while (missing := count - sum(found)) > 0:
        for i in [i for i in by_remainder if found[i] < removable[i]][:missing]:
            found[i] += 1
    return found


def _check(
    scores: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    count: int,
    allocation: str,
    floors: float | Mapping[str, float],
    original: Mapping[str, tuple[int, ...]] | None,
    cost: Mapping[str, float] | None,
    protected: Mapping[str, Tensor] | None,
) -> None:
    if not scores or set(scores) != set(live):
        raise ValueError(
            f"expected scores and masks of the same layers, got {sorted(scores)} and {sorted(live)}"
        )
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"expected count to be an int, got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"expected a count of at least 0 units, got {count}")
    for masks in (live, protected or {}):
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"expected a bool mask for {name}, got {mask.dtype}")
            if name not in scores or mask.shape != scores[name].shape:
                shape = tuple(scores[name].shape) if name in scores else "of no layer"
                raise ValueError(f"expected a mask for {name} of shape {shape}, got {tuple(mask.shape)}")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"expected an allocation among {', '.join(ALLOCATIONS)}, got {allocation!r}")
    if allocation != "global" and (original is None or set(scores) - set(original)):
        raise ValueError(
            f"expected the original weight shape of every layer for {allocation!r}, got {original}"
        )
    for share in floors.values() if isinstance(floors, Mapping) else (floors,):
        if not 0 <= share <= 1:
            raise ValueError(f"expected floors from 0 to 1, got {share}")
    if cost is not None and (set(scores) - set(cost) or min(cost.values()) <= 0):
        raise ValueError(f"expected a positive cost for every layer, got {dict(cost)}")
