"""Labels of every tensor that is alive, kept by storage: views and writes into views come out right.

The labels of a storage repeat with a period (they are the same for every sample and token, as a rule), and
one period is kept: memory and work do not grow with the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dynaprune.neurons.channel_sets import NEUTRAL, ChannelSets, Labels, uniform

_CLEAN_EVERY = 256


def storage_key(tensor: Tensor) -> StorageWeakRef | None:
    """Names the memory that ``tensor`` lies in; None for tensors without plain memory."""
    if tensor.layout != torch.strided:
        return None
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


class LabelStorage:
    """Labels by storage.

    Args:
        unknown: the label of tensors that were never written.
    """

    def __init__(self, sets: ChannelSets, unknown: int) -> None:
        self._sets = sets
        self._unknown = unknown
        self._periods: dict[StorageWeakRef, tuple[int, Tensor]] = {}
        self._writes = 0

    def read(self, tensor: Tensor) -> Labels:
        """The labels of ``tensor``."""
        key = storage_key(tensor)
        if key is None or key not in self._periods or tensor.numel() == 0:
            return uniform(self._unknown if tensor.numel() else NEUTRAL, tensor.shape)
        period = self._of_size(tensor, *self._periods[key])
        length = period.numel()
        sizes, reach = [], int(tensor.storage_offset()) % length
        start = reach
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            kept = size if stride % length else 1
            sizes.append(kept)
            reach += (kept - 1) * stride
        if reach >= length:
            period = period.repeat(reach // length + 1)
        self._sets.work += max(reach, length)
        strides = [s if n > 1 else 1 for n, s in zip(sizes, tensor.stride(), strict=True)]
        return Labels(
            collapsed(period.as_strided(sizes, strides, period.storage_offset() + start)), tuple(tensor.shape)
        )

    def _of_size(self, tensor: Tensor, size: int, period: Tensor) -> Tensor:
        """``period``, per element of another size: complex numbers take two elements each, or give them."""
        wanted = tensor.element_size()
        if wanted == size or period.numel() == 1:
            return period
        if wanted < size:
            return period.repeat_interleave(size // wanted)
        ratio = wanted // size
        pairs = period.repeat(ratio if period.numel() % ratio else 1).view(-1, ratio)
        merged = self._sets.merge(
            Labels(pairs, tuple(pairs.shape)), [1], "its outputs are taken for complex numbers"
        )
        return merged.values.expand(-1, 1).reshape(-1)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Label ``tensor`` with ``values``, of size 1 or its own along each of its dimensions."""
        key = storage_key(tensor)
        if key is None or tensor.numel() == 0:
            return
        self._writes += 1
        if self._writes % _CLEAN_EVERY == 0:
            for old in [each for each in self._periods if each.expired()]:
                del self._periods[old]
        values = collapsed(values)
        order = _dense_order(tensor)
        size, known = tensor.element_size(), key in self._periods
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * size
        if order is not None and tensor.storage_offset() == 0 and (whole or not known):
            self._periods[key] = size, _one_period(tensor, values, order)
            self._sets.work += self._periods[key][1].numel()
            return
        if known and _same(self.read(tensor).values, values):
            return
        self._write_part(key, tensor, values)

    def _write_part(self, key: StorageWeakRef, tensor: Tensor, values: Tensor) -> None:
        size = tensor.element_size()
        count = tensor.untyped_storage().nbytes() // size
        old = torch.tensor([self._unknown], dtype=torch.int32)
        if key in self._periods:
            old = self._of_size(tensor, *self._periods[key])
        everything = old.repeat(-(-count // old.numel()))[:count]
        self._sets.work += count
        sizes = [n if s else 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        part = everything.as_strided(sizes, tensor.stride(), tensor.storage_offset())
        for dim, kept in enumerate(sizes):
            values = values.narrow(dim, 0, min(kept, values.size(dim)))
        part.copy_(values.expand(sizes))
        self._periods[key] = size, everything


def collapsed(values: Tensor) -> Tensor:
    """``values``, of size 1 along every dimension where they stay the same."""
    for dim in range(values.dim()):
        if values.size(dim) > 1:
            first = values.narrow(dim, 0, 1)
            if bool((values == first).all()):
                values = first
    return values


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _dense_order(tensor: Tensor) -> list[int] | None:
    """Dimensions longer than 1 from the greatest stride to the least, None where the strides leave gaps."""
    order = sorted((d for d in range(tensor.dim()) if tensor.size(d) > 1), key=tensor.stride, reverse=True)
    expected = 1
    for dim in reversed(order):
        if tensor.stride(dim) != expected:
            return None
        expected *= tensor.size(dim)
    return order


def _one_period(tensor: Tensor, values: Tensor, order: list[int]) -> Tensor:
    while order and values.size(order[0]) == 1:
        order = order[1:]
    rest = [d for d in range(tensor.dim()) if d not in order]
    ordered = values.permute([*rest, *order])
    return ordered.expand([1 for _ in rest] + [tensor.size(d) for d in order]).reshape(-1).clone()
