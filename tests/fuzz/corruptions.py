"""What may become of an index: numbers near and far from bounds, sections moved, averages, other sizes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.kernel_problems import Problem, draw_slots, index_of

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def _bounds(p: Problem) -> list[int]:
    """Numbers that are the last right or the first wrong ones somewhere."""
    rows, columns = p.grid
    near = [0, p.capacity, rows, columns, p.lists, rows * columns, int(p.index[0])]
    return [n + off for n in near for off in (-1, 0, 1)] + [INT_MIN, INT_MIN + 1, INT_MAX, 2**30, -(2**30)]


def _sections(p: Problem) -> list[slice]:
    (rows, _), c = p.grid, p.capacity
    ends = np.cumsum([0, 8, c, rows + 1, c, c, p.lists + 1, c, c, c, rows, p.lists])
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def _places(p: Problem, pick: random.Random) -> list[int]:
    part = pick.choice([s for s in _sections(p) if s.stop > s.start] + [slice(0, p.index.numel())])
    return [pick.randrange(part.start, part.stop) for _ in range(pick.choice([1, 1, 1, 2, 5]))]


def _random(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    for at in _places(p, pick):
        index[at] = pick.randint(INT_MIN, INT_MAX)
    return index


def _off_by_one(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    for at in _places(p, pick):
        index[at] += pick.choice([-1, 1])
    return index


def _bound(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    for at in _places(p, pick):
        index[at] = pick.choice(_bounds(p))
    return index


def _filled_section(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    index[pick.choice(_sections(p))] = pick.choice(_bounds(p))
    return index


def _all_bits_negated(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    return ~index if pick.random() < 0.5 else -index


def _moved_section(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    a, b = (pick.choice(_sections(p)) for _ in range(2))
    size = min(a.stop - a.start, b.stop - b.start)
    first, second = (index[s.start : s.start + size].clone() for s in (a, b))
    index[a.start : a.start + size], index[b.start : b.start + size] = second, first
    return index


def _rolled(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    part = pick.choice([*_sections(p), slice(0, index.numel())])
    index[part] = index[part].roll(pick.choice([-1, 1, 2]))
    return index


def _exchanged(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    part = pick.choice([s for s in _sections(p) if s.stop > s.start])
    a, b = (pick.randrange(part.start, part.stop) for _ in range(2))
    index[a], index[b] = index[b].item(), index[a].item()
    return index


def _doubled(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    part = pick.choice([s for s in _sections(p) if s.stop > s.start])
    index[pick.randrange(part.start, part.stop)] = index[pick.randrange(part.start, part.stop)].item()
    return index


def _averaged(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    """An average with the index of another mask, as EMA and SWA make it, or with zeros."""
    draw = np.random.default_rng(pick.getrandbits(63))
    other = index_of(p, *draw_slots(p.grid, p.capacity, draw)) if pick.random() < 0.8 else index * 0
    decay = pick.choice([0.5, 0.9, 0.999])
    average = index.double() * decay + other.double() * (1 - decay)
    if pick.random() < 0.3:  # one section alone
        part = pick.choice(_sections(p))
        index[part] = average[part].to(torch.int32)
        return index
    return average.to(torch.int32)


def _of_another_mask(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    """A right index, whole or in part."""
    draw = np.random.default_rng(pick.getrandbits(63))
    other = index_of(p, *draw_slots(p.grid, p.capacity, draw))
    if pick.random() < 0.5:
        part = pick.choice(_sections(p))
        other[part] = index[part]
    return other


def _constant(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    return torch.full_like(index, pick.choice([0, 1, -1, INT_MAX, INT_MIN, *_bounds(p)]))


def _noise(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    high = pick.choice([2, 8, max(p.capacity, 2), INT_MAX])
    generator = torch.Generator().manual_seed(pick.getrandbits(63))
    return torch.randint(-1, high, index.shape, generator=generator, dtype=torch.int32)


def _sorted(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    part = pick.choice([*_sections(p), slice(0, index.numel())])
    index[part] = index[part].sort(descending=pick.random() < 0.5).values
    return index


def _other_length(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    by = pick.choice([-12, -8, -6, -2, -1, 1, 2, 6, 8, 12, -index.numel(), index.numel()])
    size = max(index.numel() + by, 0)
    return torch.cat([index, index])[:size].clone()


def _other_tensor(p: Problem, index: Tensor, pick: random.Random) -> Tensor:
    """Another dtype, number of dimensions, device, other strides, or no memory."""
    kind = pick.randrange(7)
    if kind == 6:
        index.untyped_storage().resize_(pick.choice([0, 4, 4 * index.numel() - 4]))
        return index
    return [
        index.long(), index.float(), index[None], index.repeat_interleave(2)[::2],
        index[:1].expand(index.shape), index.to("meta"),
    ][kind]  # fmt: skip


CORRUPTIONS: dict[str, Callable[[Problem, Tensor, random.Random], Tensor]] = {
    function.__name__[1:]: function
    for function in (
        _random, _off_by_one, _bound, _filled_section, _all_bits_negated, _moved_section, _rolled, _exchanged,
        _doubled, _averaged, _of_another_mask, _constant, _noise, _sorted, _other_length, _other_tensor,
    )
}  # fmt: skip


def corrupted(p: Problem, kind: str, pick: random.Random) -> Tensor:
    """A new index: the problem's own after a corruption of this kind."""
    return CORRUPTIONS[kind](p, p.index.clone(), pick)
