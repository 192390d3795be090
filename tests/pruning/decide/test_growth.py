"""Which removed blocks return, in what state, and how long they are safe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dynaprune.nn.optimizer_state import seed_state
from dynaprune.pruning.decide.growth import growth_fraction, select_growth


def test_the_fraction_follows_half_a_cosine() -> None:
    assert growth_fraction(0, 100, 0.3) == pytest.approx(0.3)
    assert growth_fraction(50, 100, 0.3) == pytest.approx(0.15)
    assert growth_fraction(25, 100, 0.4) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert growth_fraction(100, 100) == growth_fraction(1000, 100) == 0
    with pytest.raises(ValueError, match="fraction from 0 to 1, got 2"):
        growth_fraction(0, 100, 2)
    with pytest.raises(ValueError, match=r"step of at least 0 .* got -1"):
        growth_fraction(-1, 100)


def _grown(masks: dict[str, Tensor]) -> list[tuple[str, int]]:
    return [(n, i) for n, m in masks.items() for i in torch.nonzero(m.flatten()).flatten().tolist()]


def test_the_largest_gradients_return_up_to_count_and_capacity() -> None:
    norms = {"a": torch.tensor([[5.0, 4.0], [3.0, 9.0]]), "b": torch.tensor([[4.0, 8.0, 1.0]])}
    eligible = {"a": torch.tensor([[True, True], [True, False]]), "b": torch.ones(1, 3, dtype=torch.bool)}
    room = {"a": 9, "b": 9}
    assert _grown(select_growth(norms, eligible, 1, room)) == [("b", 1)]
    of_ties_the_first = [("a", 0), ("a", 1), ("b", 1)]
    assert _grown(select_growth(norms, eligible, 3, room)) == of_ties_the_first
    assert _grown(select_growth(norms, eligible, 99, {"a": 2, "b": 0})) == [("a", 0), ("a", 1)]
    assert _grown(select_growth(norms, eligible, 0, room)) == []
    assert norms["a"][1, 1] == 9, "inputs stay as they were"


def test_blocks_without_gradient_do_not_return() -> None:
    norms = {"a": torch.tensor([0.0, float("nan"), float("inf"), 1e-9])}
    masks = select_growth(norms, {"a": torch.ones(4, dtype=torch.bool)}, 4, {"a": 4})
    assert _grown(masks) == [("a", 3)]


def test_growth_reads_no_value_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("read a value back")

    for attribute in ("item", "tolist", "__bool__"):
        monkeypatch.setattr(Tensor, attribute, forbidden)
    select_growth({"a": torch.rand(3, 4)}, {"a": torch.ones(3, 4, dtype=torch.bool)}, 5, {"a": 3})
    slots = torch.ones(4, dtype=torch.bool)
    seed_state("exp_avg_sq", torch.rand(4, 2, 2), slots, slots)


def test_wrong_growth_input_is_refused() -> None:
    norms, eligible = {"a": torch.rand(3)}, {"a": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="same layers"):
        select_growth(norms, eligible, 1, {})
    with pytest.raises(ValueError, match="counts of at least 0, got -1"):
        select_growth(norms, eligible, -1, {"a": 1})
    with pytest.raises(TypeError, match="bool mask for a"):
        select_growth(norms, {"a": torch.ones(3)}, 1, {"a": 1})
    with pytest.raises(ValueError, match=r"for a of shape \(3,\), got \(2,\)"):
        select_growth(norms, {"a": torch.ones(2, dtype=torch.bool)}, 1, {"a": 1})


def _slots() -> tuple[Tensor, Tensor, Tensor]:
    state = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 3).clone()
    state[3] = float("nan")
    return state, torch.tensor([True, True, True, False]), torch.tensor([False, True, False, False])


@pytest.mark.parametrize("key", ["exp_avg_sq", "max_exp_avg_sq", "square_avg"])
def test_second_moments_start_at_the_live_mean(key: str) -> None:
    state, live, new = _slots()
    seeded = seed_state(key, state, live, new)
    assert torch.equal(seeded[1], torch.full((2, 3), 1.0)), "mean of slots 0 and 2; garbage in 3 is not read"
    assert torch.equal(seeded[[0, 2]], state[[0, 2]])
    assert torch.isnan(seeded[3]).all() and state[1, 0, 0] == 1


@pytest.mark.parametrize("key", ["exp_avg", "momentum_buffer"])
def test_other_state_starts_at_zero(key: str) -> None:
    state, live, new = _slots()
    assert torch.equal(seed_state(key, state, live, new)[1], torch.zeros(2, 3))


def test_a_layer_without_other_live_blocks_starts_at_zero() -> None:
    state, _, new = _slots()
    assert torch.equal(seed_state("exp_avg_sq", state, new, new)[1], torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"slots of shape \(4,\), got \(3,\)"):
        seed_state("exp_avg_sq", state, new[:3], new)
    with pytest.raises(TypeError, match="bool slots"):
        seed_state("exp_avg_sq", state, new.int(), new)


def test_a_seeded_block_takes_steps_of_the_size_of_the_others() -> None:
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.zeros(2, 8, 8))
    adam = torch.optim.Adam([values], lr=1.0)
    for _ in range(2000):
        values.grad = torch.randn(2, 8, 8)
        adam.step()
    live, new = torch.tensor([True, False]), torch.tensor([False, True])
    state = adam.state[values]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = seed_state(key, state[key], live, new)
    largest = 0.0
    for _ in range(20):
        before = values.detach().clone()
        values.grad = torch.randn(2, 8, 8)
        adam.step()
        largest = max(largest, float((values - before)[1].abs().max()))
    assert largest < 1.5, "in learning rates; zero second moments gave 6.5"
