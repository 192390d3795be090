"""When the hooks on ``optimizer.step`` run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.pruning.observe.hooks import StepHooks


class OverBase(torch.optim.AdamW):
    """A user's optimizer, whose step ends with its base's."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return super().step(closure)


class OverOver(OverBase):
    """Another one over it."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return super().step(closure)


def _counted(optimizer: torch.optim.Optimizer) -> tuple[list[str], StepHooks]:
    seen: list[str] = []
    hooks = StepHooks([optimizer], lambda _: seen.append("before"), lambda: seen.append("completed"))
    return seen, hooks


@pytest.mark.parametrize("kind", [torch.optim.AdamW, OverBase, OverOver])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_counts_once_though_it_calls_its_bases_step(
    kind: type[torch.optim.Optimizer], with_closure: bool
) -> None:
    layer = nn.Linear(3, 2)
    torch.optim.AdamW(layer.parameters())  # from here on the base's own step is wrapped, too
    OverBase(layer.parameters())
    optimizer = kind(layer.parameters())
    seen, _ = _counted(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    for _ in range(3):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert seen == ["before", "completed"] * 3


def test_a_step_that_raised_does_not_hide_the_next_one() -> None:
    layer = nn.Linear(3, 2)
    torch.optim.AdamW(layer.parameters())
    optimizer = OverBase(layer.parameters())
    seen, _ = _counted(optimizer)

    def fails() -> float:
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        optimizer.step(fails)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert seen == ["before", "completed"]


def test_two_optimizers_may_step_one_inside_the_other() -> None:
    inner = torch.optim.SGD(nn.Linear(3, 2).parameters(), 0.1)

    class Calls(OverBase):
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            inner.step()
            return super().step(closure)

    outer = Calls(nn.Linear(3, 2).parameters())
    done: list[torch.optim.Optimizer] = []
    StepHooks([inner, outer], done.append, lambda: done.append(outer))
    outer.step()
    assert done == [outer, inner, outer]


def test_the_pruner_counts_the_steps_of_such_an_optimizer_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    torch.optim.AdamW(model.parameters())
    optimizer = OverBase(model.parameters(), lr=1e-2)
    config = dynaprune.PruningConfig(target_sparsity=0.5, block_size=8, total_steps=20, interval=2)
    pruner = dynaprune.attach(model, optimizer, config)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().sum().backward()
        optimizer.step()
    assert pruner.steps == 5
