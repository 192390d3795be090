"""Calls of the raw ops in which one to three arguments are not what they should be."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.kernel_problems import Problem, public_calls, raw_calls

# Among them sizes whose products leave 64 bits: 6 x (2^63 + 1) / 3 is 2 modulo 2^64.
INTEGERS = [
    -(2**63), -(2**32), -(2**31), -2, -1, 0, 1, 2, 3, 7, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40,
    2**61, 2**62, 2**63 - 1, (2**63 + 1) // 3,
]  # fmt: skip
DTYPES = [torch.float16, torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64]


def all_calls(p: Problem) -> list[tuple[str, str, list[Any]]]:
    """Right calls: namespace, op, arguments."""
    index, (rows, columns), g = p.index, p.grid, p.geometry
    mask, slots = torch.from_numpy(p.mask.copy()), torch.from_numpy(p.slots.astype("int32"))
    calls = [("dynaprune_cpu", op, arguments) for op, arguments in raw_calls(p, index).items()]
    calls += [("dynaprune", op[0], op[1:]) for op in public_calls(p, index).values()]
    of_grid = [g.groups, list(g[0:2]), list(g[2:4]), list(g[6:8])]
    changed = [mask, slots, index.clone(), p.capacity]
    calls += [
        ("dynaprune_cpu", "layout_update", [*changed, *of_grid, True]),
        ("dynaprune", "layout_update", [*changed, None if p.conv is None else list(p.conv), False]),
        ("dynaprune_cpu", "check_index", [index, rows, columns, p.capacity, list(g), True]),
    ]
    return calls


def _integer(value: int, pick: random.Random) -> int:
    near = [value - 1, value + 1, 2 * value, value * 2**32 + value, -value, value + 2**32]
    return int(pick.choice([*near, *INTEGERS]))


def _tensor(t: Tensor, pick: random.Random) -> Any:
    kind = pick.randrange(15)
    dim = pick.randrange(t.dim()) if t.dim() else 0
    if kind == 0:
        return t.to(pick.choice(DTYPES))
    if kind == 1:
        return t[None] if pick.random() < 0.5 else t.flatten()
    if kind == 2 and t.dim():
        return t.narrow(dim, 0, max(t.shape[dim] - 1, 0))
    if kind == 3 and t.dim():
        return torch.cat([t, t.narrow(dim, 0, min(1, t.shape[dim]))], dim)
    if kind == 4 and t.dim():
        return t.narrow(dim, 0, 0)
    if kind == 5 and t.dim() >= 2:
        return t.transpose(dim, pick.randrange(t.dim()))
    if kind == 6 and t.dim():
        return t.repeat_interleave(2, dim).unflatten(dim, (t.shape[dim], 2)).select(dim + 1, 0)
    if kind == 7:
        return t.to("meta")
    if kind == 8 and t.numel():
        emptied = t.clone()
        emptied.untyped_storage().resize_(pick.choice([0, t.element_size()]))
        return emptied
    if kind == 9 and t.dim():
        return t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape)
    if kind == 10:
        return torch.empty([pick.choice([0, 1, 2, 2**20, 2**31, 2**40]) for _ in t.shape[:-1]] + [0])
    if kind == 11 and t.numel():
        return t.flatten()[:1].expand(pick.choice([2**20, 2**33])).as_strided(t.shape, [0] * t.dim())
    if kind == 12 and t.dtype.is_floating_point:
        return t.to_sparse() if pick.random() < 0.5 else torch.empty(t.shape, dtype=t.dtype).requires_grad_()
    if kind == 13:
        return pick.choice([None, 1, 1.5, "x", [1, 2], torch.tensor(1), torch.empty(0)])
    return torch.randint(-3, 100, t.shape).to(t.dtype)


def _numbers(numbers: list[int], pick: random.Random) -> Any:
    numbers = list(numbers)
    kind = pick.randrange(6)
    if kind == 0:
        return numbers[:-1]
    if kind == 1:
        return [*numbers, 1]
    if kind == 2:
        return pick.choice([[], None, 1, ["x"], [1.5] * len(numbers)])
    for _ in range(pick.choice([1, 1, 2])):
        at = pick.randrange(len(numbers))
        numbers[at] = _integer(numbers[at], pick)
    return numbers


def malformed(arguments: list[Any], pick: random.Random) -> list[Any]:
    """Other arguments, each broken at most once; tensors that an op may write to are copies."""
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    right = list(arguments)
    for at in pick.sample(range(len(arguments)), min(pick.choice([1, 1, 1, 2, 3]), len(arguments))):
        value = arguments[at]
        if isinstance(value, bool):
            arguments[at] = pick.choice([None, 2, "x", not value])
        elif isinstance(value, Tensor):
            tensors = [a for a in right if isinstance(a, Tensor)]
            arguments[at] = pick.choice(tensors) if pick.random() < 0.2 else _tensor(value, pick)
        elif isinstance(value, int):
            arguments[at] = _integer(value, pick)
        elif isinstance(value, list):
            arguments[at] = _numbers(value, pick)
        else:
            arguments[at] = pick.choice([1, [1] * 9, torch.ones(3)])
    return arguments
