"""A model, its optimizer and the random states, taken as plain values and given to others of their kind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.experiment.model_state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dynaprune.experiment.random_states import random_states, set_random_states
from dynaprune.saving.carried import from_tensors, to_tensors

CPU = torch.device("cpu")


class _Network(nn.Module):
    """Convolutions that lie channels-last, a norm, a matrix that lies transposed and one that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 32, 1)
        self.hidden = nn.Linear(32, 32)
        self.tied = nn.Linear(32, 32)
        self.tied.weight = self.hidden.weight
        self.head = nn.Linear(32, 4)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head.weight.data = self.head.weight.data.t().contiguous().t()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3))
        return self.head(self.tied(torch.relu(self.hidden(x))))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad(set_to_none=True)
    loss = model(torch.randn(5, 3, 6, 6, generator=generator)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _new(seed: int, fused: bool) -> tuple[_Network, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = _Network()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_model_and_optimizer_go_on_bit_for_bit_and_lie_in_memory_as_they_did(fused: bool) -> None:
    model, optimizer = _new(1, fused)
    for seed in range(3):
        _step(model, optimizer, seed)
    state = {"model": model_state(model), "optimizer": optimizer_state(optimizer)}
    assert set(state["model"]["strides"]) == {"first.weight", "second.weight", "head.weight"}
    assert state["model"]["aliases"] == {"tied.weight": "hidden.weight"}
    read = from_tensors(to_tensors(state))
    assert read is not None
    other, others = _new(2, fused)
    other.first.weight.data = other.first.weight.data.contiguous()
    load_model_state(other, read["model"])
    load_optimizer_state(others, other, read["optimizer"])
    assert other.tied.weight is other.hidden.weight and others.param_groups[0]["betas"] == (0.9, 0.999)
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride(), name
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(others.state[mine][key], value), (name, key)
            assert others.state[mine][key].stride() == value.stride(), (name, key)
    for seed in range(3, 6):
        assert torch.equal(_step(model, optimizer, seed), _step(other, others, seed))


def test_a_pruned_structure_comes_back_with_its_optimizer() -> None:
    def pruned() -> tuple[nn.Module, torch.optim.Optimizer, dynaprune.Pruner]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        optimizer = torch.optim.Adam(model.parameters())
        config = dynaprune.PruningConfig(
            target_sparsity=0.7, block_size=8, total_steps=40, end=0.5, interval=2, exclude=["4"]
        )
        return model, optimizer, dynaprune.attach(model, optimizer, config, example_inputs=torch.randn(2, 16))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(seed)
        loss = model(torch.randn(8, 16, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    model, optimizer, pruner = pruned()
    for seed in range(13):
        step(model, optimizer, seed)
    assert pruner.sparsity > 0.4 and pruner.compactions > 0
    tensors = to_tensors(
        {"m": model_state(model), "o": optimizer_state(optimizer), "pruner": pruner.state_dict()}
    )
    state = from_tensors(tensors)
    assert state is not None
    other, others, theirs = pruned()
    theirs.load_state_dict(state["pruner"])
    load_model_state(other, state["m"])
    load_optimizer_state(others, other, state["o"])
    for seed in range(13, 40):
        assert torch.equal(step(model, optimizer, seed), step(other, others, seed))
    assert pruner.history == theirs.history and pruner.target_reached
    pruner.detach()
    theirs.detach()


def test_the_state_of_another_network_is_refused() -> None:
    model, optimizer = _new(1, False)
    _step(model, optimizer, 0)
    state, saved = model_state(model), optimizer_state(optimizer)
    with pytest.raises(ValueError, match="another's: without layers"):
        load_model_state(nn.Linear(3, 3), state)
    for strides in ([1, 2], [33, 1], [1], [0, 1], [-1, 4]):
        with pytest.raises(ValueError, match=r"strides of a tensor of shape \(4, 32\)"):
            load_model_state(_Network(), {**state, "strides": {"head.weight": strides}})
    moments = {**saved["state"]["0"], "exp_avg": torch.zeros(7)}
    with pytest.raises(RuntimeError, match=r"exp_avg of shape \(7,\) for first\.weight"):
        wrong = {**saved, "state": {**saved["state"], "0": moments}, "strides": {**saved["strides"], "0": {}}}
        load_optimizer_state(optimizer, model, wrong)


def test_random_states_come_back_and_taking_them_draws_nothing() -> None:
    def draw() -> list[float]:
        normal = float(np.random.standard_normal())
        return [float(torch.rand(())), normal, random.random(), random.gauss(0, 1)]

    draw()  # so that numpy and Python hold the second of a pair of normal numbers
    state = from_tensors(to_tensors(random_states(CPU)))
    assert state is not None
    first = draw()
    set_random_states(state, CPU)
    random_states(CPU)
    assert draw() == first
