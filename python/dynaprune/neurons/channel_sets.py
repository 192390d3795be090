"""Which channels can only be cut together: sets that grow while a forward pass is followed.

A *channel* is one output or one input of a layer, numbered over the whole model. A tensor's *labels* say for
every element which channel it belongs to: a number from 0 on; ``NEUTRAL`` for a constant that is the same
everywhere and so fits any width; any other negative number where the element belongs to no channel and its
place is fixed (a model's input, a parameter that is no layer's), by what made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NEUTRAL = -(2**31) + 1
_MAX_PAIRS = 2**24


@dataclass(frozen=True)
class Labels:
    """Labels of one tensor of shape ``shape``.

    ``values`` int32 on the CPU, of as many dimensions; of size 1 along those where the labels stay the same.
    """

    values: Tensor
    shape: tuple[int, ...]

    @property
    def dyed(self) -> bool:
        """Whether any element belongs to a channel."""
        return bool((self.values >= 0).any())

    def fixed(self) -> int:
        """What a tensor without channels is: the latest of its origins, ``NEUTRAL`` where it has none."""
        return latest(self.values[self.values != NEUTRAL].tolist())


def latest(labels: Iterable[int]) -> int:
    """The fixed label that was made last: parameters come after inputs and constants."""
    return min((label for label in labels if label != NEUTRAL), default=NEUTRAL)


def uniform(label: int, shape: Iterable[int]) -> Labels:
    """The same label everywhere."""
    shape = tuple(shape)
    return Labels(torch.full((1,) * len(shape), label, dtype=torch.int32), shape)


class DisjointSets:
    """Numbers from 0 to ``count`` - 1 in disjoint sets; every set is named by one of its members."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._root = np.arange(count)
        self._members: dict[int, list[int]] = {}

    def roots(self, numbers: Tensor) -> Tensor:
        """int64 names of the sets that ``numbers`` are in."""
        return torch.from_numpy(self._root)[numbers.long()]

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Put ``a[i]`` and ``b[i]`` into one set, for every i."""
        first, second = self.roots(a.reshape(-1)), self.roots(b.reshape(-1))
        differ = first != second
        for pair in (first[differ] * self.count + second[differ]).unique().tolist():
            self._join(*divmod(pair, self.count))

    def _join(self, a: int, b: int) -> None:
        a, b = int(self._root[a]), int(self._root[b])
        if a == b:
            return
        mine, others = self._members.pop(a, [a]), self._members.pop(b, [b])
        if len(mine) < len(others):
            a, b, mine, others = b, a, others, mine
        self._root[others] = a
        mine += others
        self._members[a] = mine
        self._joined(a, b)

    def _joined(self, kept: int, lost: int) -> None:
        """Set ``lost`` has become part of ``kept``."""


class ChannelSets(DisjointSets):
    """Channels that are cut together, and the reasons why some are not cut at all.

    Attributes:
        along: bool ``[count]``: channels that act through softmax weights only (queries, keys).
        averaged: bool ``[count]``: channels that such weights average (values).
        scaled: bool ``[count]``: channels that data scales or masks on the way to their readers: a constant
            that they make is none for other data.
        work: label elements looked at so far.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.along = torch.zeros(count, dtype=torch.bool)
        self.averaged = torch.zeros(count, dtype=torch.bool)
        self.scaled = torch.zeros(count, dtype=torch.bool)
        self.work = 0
        self._blocked: dict[int, str] = {}
        self._origins: dict[str, int] = {}

    def fixed(self, origin: str) -> int:
        """The label of elements that belong to no channel but to ``origin``, a noun phrase."""
        return self._origins.setdefault(origin, -1 - len(self._origins))

    def origin(self, label: int) -> str:
        """The noun phrase of a fixed label."""
        return list(self._origins)[-1 - label]

    def _joined(self, kept: int, lost: int) -> None:
        reason = self._blocked.pop(lost, "")
        if reason:
            self._blocked.setdefault(kept, reason)

    def reason(self, channel: int) -> str:
        """Why the set of ``channel`` cannot be cut, empty where it may."""
        return self._blocked.get(int(self._root[channel]), "")

    def block(self, labels: Tensor, reason: str) -> None:
        """Let no channel in ``labels`` be cut."""
        self.work += labels.numel()
        for root in self.roots(labels[labels >= 0]).unique().tolist():
            self._blocked.setdefault(root, reason)

    def mark_along(self, labels: Tensor) -> None:
        """What is in the sets of ``labels`` so far acts through softmax weights, unless they average it."""
        new = self._tied_to(labels) & ~self.averaged & ~self.along
        self.along |= new
        self.scaled &= ~new

    def mark_scaled(self, labels: Tensor) -> None:
        """Data scales or masks what is in the sets of ``labels`` so far."""
        self.scaled |= self._tied_to(labels)

    def _tied_to(self, labels: Tensor) -> Tensor:
        """bool ``[count]``: channels in the same sets as ``labels``."""
        roots = self.roots(labels[labels >= 0]).unique()
        return torch.isin(torch.from_numpy(self._root), roots)

    def merge(self, x: Labels, dims: Sequence[int], reason: str) -> Labels:
        """Labels after something that mixes all elements along ``dims``, or that fixes their number there.

        What lies along ``dims`` goes as a whole or stays. Where that ties all channels of ``x`` together, or
        to a fixed element, they stay for ``reason``.
        """
        varying = [d for d in dims if x.values.size(d) > 1]
        if not varying:
            return x
        self.work += x.values.numel()
        rest = [d for d in range(x.values.dim()) if d not in varying]
        fibers = x.values.permute(*rest, *varying).reshape(*(x.values.size(d) for d in rest), -1)
        dyed = fibers >= 0
        lead = fibers.amax(-1, keepdim=True)
        self.unite(lead.expand_as(fibers)[dyed], fibers[dyed])
        self.block(lead[(~dyed & (fibers != NEUTRAL)).any(-1, keepdim=True)], reason)
        roots = self.roots(fibers[dyed]).unique()
        if roots.numel() == 1:
            self.block(roots, reason)
            lead = torch.where(lead >= 0, self.fixed("what mixes all its channels"), lead).int()
        shape = [1 if d in varying else x.values.size(d) for d in range(x.values.dim())]
        return Labels(lead.reshape(shape), x.shape)

    def combine(self, parts: Sequence[Labels], ndim: int) -> Tensor:
        """Labels of an element-wise result of broadcast ``parts``: ``values`` of ``ndim`` dimensions.

        Channels that meet become one set. A fixed operand that extends along a dimension fixes its size.
        """
        padded = [_padded(part, ndim) for part in parts]
        dyed = [part for part in padded if part.dyed]
        plain = [part for part in padded if not part.dyed]
        fixed = [part for part in plain if part.fixed() != NEUTRAL]
        if not dyed:
            return uniform(latest(part.fixed() for part in fixed), (1,) * ndim).values
        for x in dyed:
            for other in fixed:
                dims = [d for d in range(ndim) if other.shape[d] > 1 and x.values.size(d) > 1]
                if any(n > 1 for n in other.shape):
                    self.mark_scaled(x.values)
                if dims:
                    self.merge(x, dims, f"its outputs meet {self.origin(other.fixed())}")
        values = dyed[0].values
        for other in dyed[1:]:
            values = self._meet(values, other.values)
        return values

    def _meet(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape == b.shape and torch.equal(a, b):
            self.work += a.numel()
            return a
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if torch.Size(shape).numel() > max(_MAX_PAIRS, a.numel() + b.numel()):
            for each in (a, b):
                self.block(each, "too many different channels meet to follow them")
            return uniform(self.fixed("what is too large to follow"), (1,) * len(shape)).values
        a, b = a.expand(shape), b.expand(shape)
        self.work += a.numel()
        both = (a >= 0) & (b >= 0)
        self.unite(a[both], b[both])
        for x, other in ((a, b), (b, a)):
            held = (x >= 0) & (other < 0) & (other != NEUTRAL)
            if bool(held.any()):
                self.block(x[held], f"its outputs meet {self.origin(int(other[held].max()))}")
        return torch.maximum(a, b)

    def contract(self, a: Labels, b: Labels, ndim: int, reason: str) -> Tensor:
        """Labels of ``a [..., m, k]`` times ``b [..., k, n]``: ``values`` of ``ndim`` dimensions."""
        a, b = _padded(a, ndim), _padded(b, ndim)
        for x, dim, other in ((a, ndim - 1, b), (b, ndim - 2, a)):
            if not x.dyed or x.values.size(dim) == 1:
                continue
            if not other.dyed and other.fixed() != NEUTRAL:
                reason = f"{reason}, together with {self.origin(other.fixed())}"
        for weights, x in ((a, b), (b, a)):
            if x.dyed and bool(self.along[weights.values[weights.values >= 0].long()].any()):
                self.averaged |= self._tied_to(x.values) & ~self.along
        if a.dyed and b.dyed and a.values.size(-1) > 1 and b.values.size(-2) > 1:
            self._meet(a.values.unsqueeze(-1), b.values.unsqueeze(-3))
        a, b = self.merge(a, [ndim - 1], reason), self.merge(b, [ndim - 2], reason)
        left = Labels(a.values, (*a.shape[:-1], 1))
        right = Labels(b.values, (*b.shape[:-2], 1, b.shape[-1]))
        return self.combine([left, right], ndim)


def _padded(x: Labels, ndim: int) -> Labels:
    """``x`` with dimensions of size 1 in front."""
    ones = (1,) * (ndim - x.values.dim())
    return Labels(x.values.reshape(ones + tuple(x.values.shape)), ones + x.shape) if ones else x
