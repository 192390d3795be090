"""How long a sparse training may be: planned FLOPs against those that a real training counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.pruning.counted_flops import flops_of
from dynaprune.pruning.planned_flops import FlopsOfSample, planned_flops

pytestmark = pytest.mark.filterwarnings("ignore:block-sparse ops:RuntimeWarning")
INPUTS = torch.randn(6, 3, 8, 8)


class Small(nn.Module):
    """A convolution that stays, one that is pruned, a norm, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.inner, self.head = nn.Linear(32 * 16, 64), nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(torch.relu(self.stem(images)))))
        return self.head(torch.relu(self.inner(nn.functional.max_pool2d(x, 2).flatten(1))))


def config(**given: Any) -> dynaprune.PruningConfig:
    sparse = {"initial_sparsity": 0.6, "target_sparsity": 0.6, "neurons": False, "block_size": 8}
    return dynaprune.PruningConfig(**{**sparse, **given})


def trained(settings: dynaprune.PruningConfig | None, steps: int) -> int:
    """FLOPs that a training counts, step by step."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if settings is not None:
        dynaprune.attach(model, optimizer, settings, example_inputs=INPUTS)
    total = 0
    for _ in range(steps):
        optimizer.zero_grad()
        total += flops_of(lambda: model(INPUTS).sum().backward())[1]
        optimizer.step()
    return total


@pytest.mark.parametrize("given", [{}, {"rewire": 0.3}, {"rewire": 0.3, "rewire_growth": "random"}])
def test_the_steps_spend_the_budget_and_one_more_would_not(given: dict[str, Any]) -> None:
    budget = 0.5 * trained(None, 30)
    steps = dynaprune.steps_for_budget(Small(), config(**given), 30, 0.5, example_inputs=INPUTS)
    assert 15 < steps < 60
    assert trained(config(total_steps=steps, **given), steps) <= budget
    assert trained(config(total_steps=steps + 1, **given), steps + 1) > budget


def test_a_gradual_schedule_is_followed() -> None:
    """Blocks have one size here and several costs: removals are of every layer alike, as the plan has it."""
    given: dict[str, Any] = {"initial_sparsity": 0.0, "target_sparsity": 0.6, "allocation": "uniform"}
    given |= {"start": 0.0, "end": 0.3}
    steps = dynaprune.steps_for_budget(Small(), config(**given), 30, 0.5, example_inputs=INPUTS)
    assert trained(config(total_steps=steps, **given), steps) == pytest.approx(
        0.5 * trained(None, 30), rel=0.03
    )


def test_more_steps_cost_more_and_a_larger_share_allows_more() -> None:
    found = [
        dynaprune.steps_for_budget(Small(), config(), 100, share, example_inputs=INPUTS)
        for share in (0.1, 0.4, 1.0, 2.0)
    ]
    assert found == sorted(found) and found[0] < found[-1]
    assert found[2] == pytest.approx(10 * found[0], abs=10)


def test_the_model_and_the_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(3)
    model = Small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    dynaprune.steps_for_budget(model, config(), 10, example_inputs=INPUTS)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_plan_adds_up_the_parts_of_a_schedule() -> None:
    """60 steps: full at first, half of the way at step 10 with a pace of one event, then the target."""
    gradual = config(
        initial_sparsity=0.0, target_sparsity=0.6, total_steps=60, start=0.0, end=0.5, interval=15
    )
    halfway = 1 - 0.5**3
    wanted = 15 * 10 + 15 * (10 - 6 * halfway) + 30 * 4
    assert planned_flops(gradual, FlopsOfSample(10, 4), int) == pytest.approx(wanted)
    rewired = config(total_steps=60, rewire=0.3, rewire_until=0.5, interval=10)
    assert planned_flops(rewired, FlopsOfSample(10, 10, 7), int) == 600 + 2 * 7


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        ({}, {"steps": 0}, "steps as a whole number of at least 1, got 0"),
        ({}, {"steps": True}, "got True"),
        ({}, {"flops": 0.0}, "a share above 0, got 0.0"),
        ({}, {"flops": 0.001}, "at least one sparse step"),
        ({"initial_sparsity": 0.0, "target_sparsity": None}, {}, "expected a target_sparsity"),
        ({"initial_sparsity": 0.0, "units": "neurons", "neurons": True}, {}, "units='neurons'"),
    ],
)
def test_what_has_no_answer_is_refused(settings: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dynaprune.steps_for_budget(
            Small(), config(**settings), **{"steps": 10, "example_inputs": INPUTS, **given}
        )
