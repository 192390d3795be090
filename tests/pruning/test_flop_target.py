"""``target_of="flops"``: neurons go until a share of the forward FLOPs of the network's layers is gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynaprune
from dynaprune import Pruner, PruningConfig
from tests.pruning.test_attach_neurons import STEPS, settings


class Images(nn.Module):
    """Most FLOPs are in the first convolutions, most weights behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.inner, self.head = nn.Linear(16 * 4, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        out: Tensor = self.head(self.inner(x).relu())
        return out


def images(step: int) -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def started(**changes: Any) -> tuple[Images, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(0)
    model = Images()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    config = settings(**{"target_sparsity": 0.4, "target_of": "flops", **changes})
    return model, optimizer, dynaprune.attach(model, optimizer, config, example_inputs=images(0))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, end: int = STEPS) -> None:
    for step in range(start, end):
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()


def forward_flops(model: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(0))
    return counter.get_total_flops()


def test_the_target_is_a_share_of_what_a_forward_pass_takes() -> None:
    first = forward_flops(Images())
    gone = {}
    for of in ("flops", "weights"):
        model, optimizer, pruner = started(target_of=of)
        train(model, optimizer)
        report = pruner.report()
        gone[of] = 1 - forward_flops(model) / first
        assert report["forward_flops_gone"] == pytest.approx(gone[of], abs=1e-12)
        assert report["target_reached"]
    assert gone["weights"] < 0.3 and 0.4 <= gone["flops"] < 0.45


def test_a_resumed_training_knows_the_first_flops() -> None:
    model, optimizer, pruner = started()
    train(model, optimizer)
    again, other, resumed = started()
    train(again, other, end=12)
    states = [copy.deepcopy(each.state_dict()) for each in (again, other, resumed)]
    assert resumed.structure.neurons.flops_gone
    again, other, resumed = started()
    for part, state in zip((again, other, resumed), states, strict=True):
        part.load_state_dict(state)
    train(again, other, start=12)
    assert resumed.report()["forward_flops_gone"] == pruner.report()["forward_flops_gone"]
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    states[2]["neurons"].pop("first_flops")
    with pytest.raises(ValueError, match="expected a state with the forward FLOPs at first"):
        started()[2].load_state_dict(states[2])


def test_floors_that_keep_too_much_are_told() -> None:
    model, optimizer, pruner = started(floor=0.9)
    with pytest.warns(RuntimeWarning, match=r"at most 1\d\.\d% of the forward FLOPs can go"):
        train(model, optimizer)
    with pytest.warns(RuntimeWarning, match=r"with 1\d\.\d% of the forward FLOPs gone, short of the target"):
        pruner.detach()


@pytest.mark.parametrize("changes", [{"units": "blocks"}, {"units": "both"}, {"target_sparsity": None}])
def test_it_needs_a_target_of_whole_neurons(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected target_of='flops' with units='neurons' and a target"):
        settings(target_of="flops", **changes)
    with pytest.raises(ValueError, match="expected target_of to be one of weights, flops, got 'time'"):
        PruningConfig(target_of="time")
