"""Selection across layers against a slow choice of one unit at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dynaprune.pruning.decide.allocation import select

SHAPES = {"a": (4, 6), "b": (10, 3), "c": (5,)}


def _case(seed: int, density: float = 0.7) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.randint(0, 12, s, generator=generator).float() for n, s in SHAPES.items()}
    live = {n: torch.rand(s, generator=generator) < density for n, s in SHAPES.items()}
    return scores, live


def _one_by_one(
    scores: dict[str, Tensor], live: dict[str, Tensor], count: int, floor: float
) -> list[tuple[str, int]]:
    """Global selection, the least scored unit whose layer is above its floor, again and again."""
    left = {n: int(m.sum()) for n, m in live.items()}
    units = [(float(scores[n].flatten()[i]), k, i, n) for k, n in enumerate(scores)
             for i in torch.nonzero(live[n].flatten()).flatten().tolist()]  # fmt: skip
    chosen = []
    for _, _, i, name in sorted(units):
        if len(chosen) < count and left[name] > max(1, math.ceil(floor * live[name].numel())):
            chosen.append((name, i))
            left[name] -= 1
    return chosen


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(10))
def test_global_selection_takes_the_least_scored_with_ties_in_order(seed: int, floor: float) -> None:
    scores, live = _case(seed)
    for count in (0, 1, 7, 20, 1000):
        selection = select(scores, live, count, floors=floor)
        expected = _one_by_one(scores, live, count, floor)
        assert len(selection) == len(expected)
        for prefix in (len(expected), len(expected) // 2, len(expected) // 4):
            masks = selection.first(prefix)
            chosen = {(n, i) for n, m in masks.items() for i in torch.nonzero(m.flatten()).flatten().tolist()}
            assert chosen == set(expected[:prefix])
            assert {n: m.shape for n, m in masks.items()} == {n: m.shape for n, m in live.items()}


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_floors_hold_and_never_the_last_unit_goes(allocation: str) -> None:
    original = {"a": (32, 48), "b": (80, 24), "c": (40, 8)}
    for seed in range(20):
        scores, live = _case(seed, 0.5)
        floors = {"a": 0.25, "b": 0.1}
        selection = select(scores, live, 10_000, allocation=allocation, floors=floors, original=original)
        for name, mask in selection.first(len(selection)).items():
            assert not (mask & ~live[name]).any()
            before, after = int(live[name].sum()), int((live[name] & ~mask).sum())
            least = max(1, math.ceil(floors.get(name, 0) * mask.numel()))
            assert after == min(before, least)


def test_uniform_leaves_one_density_and_erk_the_papers() -> None:
    shapes = {"small": (8, 8), "wide": (32, 16), "conv": (16, 9 * 16)}
    original = {"small": (64, 64), "wide": (256, 128), "conv": (128, 128, 3, 3)}
    scores = {n: torch.rand(s) for n, s in shapes.items()}
    live = {n: torch.ones(s, dtype=torch.bool) for n, s in shapes.items()}
    total = sum(m.numel() for m in live.values())
    count = int(0.8 * total)

    def densities(allocation: str) -> dict[str, float]:
        chosen = select(scores, live, count, allocation=allocation, original=original)
        assert len(chosen) == count
        return {n: 1 - float(m.float().mean()) for n, m in chosen.first(count).items()}

    for name, density in densities("uniform").items():
        assert abs(density - 0.2) * live[name].numel() <= 1
    raw = {n: sum(s) / math.prod(s) for n, s in original.items()}
    erk = densities("erk")
    assert erk["small"] == 1.0, "clipped at 1"
    rest = {n: raw[n] * live[n].numel() for n in ("wide", "conv")}
    scale = (total - count - live["small"].numel()) / sum(rest.values())
    for name in rest:
        assert abs(erk[name] - scale * raw[name]) * live[name].numel() <= 1


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_quotas_are_exact_within_layers_by_score_and_spread_alike_in_any_prefix(allocation: str) -> None:
    original = {"a": (32, 48), "b": (80, 24), "c": (40, 8)}
    for seed in range(10):
        scores, live = _case(seed)
        count = sum(int(m.sum()) for m in live.values()) // 2
        selection = select(scores, live, count, allocation=allocation, original=original)
        assert len(selection) == count
        whole, half = selection.first(count), selection.first(count // 2)
        for name, mask in whole.items():
            kept = live[name] & ~mask
            if mask.any() and kept.any():
                assert scores[name][mask].max() <= scores[name][kept].min()
            assert not (half[name] & ~mask).any()
            assert abs(float(half[name].sum()) - float(mask.sum()) / 2) <= 1.5


def test_cost_ranks_by_score_per_flop_saved() -> None:
    live = {n: torch.ones(2, dtype=torch.bool) for n in ("cheap", "dear")}
    scores = {"cheap": torch.tensor([1.0, 2.0]), "dear": torch.tensor([5.0, 30.0])}
    cost = {"cheap": 1.0, "dear": 10.0}
    assert select(scores, live, 1).order.tolist() == [0]
    assert select(scores, live, 1, cost=cost).order.tolist() == [2]
    negative = {"cheap": torch.tensor([-3.0, 2.0]), "dear": torch.tensor([-1.0, 30.0])}
    assert select(negative, live, 1).order.tolist() == [0]
    assert select(negative, live, 1, cost=cost).order.tolist() == [2], "harmful and dear goes first"


def test_protected_units_stay_and_count_towards_the_floor() -> None:
    scores = {"a": torch.arange(10.0)}
    live = {"a": torch.ones(10, dtype=torch.bool)}
    protected = {"a": torch.arange(10) < 3}
    assert select(scores, live, 4, protected=protected).order.tolist() == [3, 4, 5, 6]
    assert select(scores, live, 10, protected=protected).order.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert select(scores, live, 10, protected=protected, floors=0.5).order.tolist() == [3, 4, 5, 6, 7]


def test_unknown_scores_go_last_and_dead_units_never() -> None:
    scores = {"a": torch.tensor([float("nan"), float("inf"), 5.0, -float("inf"), 1.0])}
    live = {"a": torch.tensor([True, True, True, False, True])}
    assert select(scores, live, 3).order.tolist() == [4, 2, 0]
    nothing = {"a": torch.zeros(5, dtype=torch.bool)}
    assert len(select(scores, nothing, 3)) == 0
    assert not select(scores, nothing, 3).first(3)["a"].any()


def test_one_small_transfer_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    original_tolist = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        transfers.append(self.numel())
        return original_tolist(self)

    def forbidden(*_: object) -> None:
        raise AssertionError("read a value back")

    scores, live = _case(0)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", tolist)
        patch.setattr(Tensor, "item", forbidden)
        patch.setattr(Tensor, "__bool__", forbidden)
        select(scores, live, 9).first(5)
    assert transfers == [6]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": -1}, ValueError, "count of at least 0 units, got -1"),
        ({"count": 1.5}, TypeError, "count to be an int, got float"),
        ({"allocation": "fair"}, ValueError, "global, uniform, erk, got 'fair'"),
        ({"allocation": "erk"}, ValueError, "original weight shape of every layer for 'erk', got None"),
        ({"floors": 1.5}, ValueError, "floors from 0 to 1, got 1.5"),
        ({"cost": {"a": 1.0}}, ValueError, "positive cost for every layer"),
        ({"cost": {"a": 1.0, "b": 0.0, "c": 1.0}}, ValueError, "positive cost for every layer"),
        ({"live": {}}, ValueError, "same layers"),
        ({"live": {n: torch.ones(s) for n, s in SHAPES.items()}}, TypeError, "mask for a, got torch.float32"),
        ({"live": dict.fromkeys(SHAPES, torch.ones(3) > 0)}, ValueError, r"for a of shape \(4, 6\)"),
        ({"protected": {"z": torch.ones(3, dtype=torch.bool)}}, ValueError, "for z of shape of no layer"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    scores, live = _case(0)
    with pytest.raises(error, match=message):
        select(**{"scores": scores, "live": live, "count": 3, **change})
