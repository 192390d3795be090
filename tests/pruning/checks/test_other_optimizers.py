"""An optimizer that trains pruned weights and is not watched is said while training goes on."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import dynaprune
from dynaprune.pruning.checks.other_optimizers import LASTING
from tests.pruning.attached import STEPS, adam, loss_of, mlp, settings, train


@pytest.fixture(autouse=True)
def nothing_else_is_attached() -> Iterator[None]:
    gc.collect()
    yield


def said_in(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in record if "steps with weights of" in str(each.message)]


def second(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01)


def test_a_new_optimizer_is_said_once_with_numbers_and_what_to_do() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, 4)
    with pytest.warns(RuntimeWarning) as record:
        train(model, second(model), STEPS)
    (said,) = said_in(list(record))
    assert f"SGD has taken {LASTING} steps with weights of 2 pruned layers" in said
    assert f"watches Adam only: it stands at step 4 of {STEPS} with {pruner.sparsity:.1%}" in said
    with pytest.warns(RuntimeWarning, match=rf"short of the target's 75.0%, .* \({STEPS} of SGD\)"):
        pruner.detach()  # as advised
    optimizer = second(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(model, optimizer)
        pruner.detach()
    assert pruner.target_reached


def test_the_second_of_two_optimizers_for_halves_of_the_model_is_no_stranger() -> None:
    model = mlp()
    halves = [adam(model[:2]), second(model[2:])]
    pruner = dynaprune.attach(model, halves, settings())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "block-sparse ops on cpu run on the dense backend")
        for step in range(STEPS):
            loss_of(model, step).backward()
            for each in halves:
                each.step()
                each.zero_grad()
        for _ in range(2 * LASTING):
            loss_of(model, 0).backward()
            halves[1].step()
    assert pruner.target_reached


def test_optimizers_that_are_nobodys_business() -> None:
    """Of other models, of unpruned weights, in turn with the watched one, after the end, after detach."""
    model, other = mlp(), mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    head = torch.optim.SGD(model[4].parameters(), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "block-sparse ops on cpu run on the dense backend")
        train(other, adam(other))
        loss_of(model, 0).backward()
        for _ in range(2 * LASTING):
            head.step()
        in_turn = second(model)
        for step in range(STEPS):
            train(model, in_turn, LASTING - 1)
            train(model, optimizer, 1, step)
        assert pruner.target_reached and pruner.steps == STEPS
        train(model, second(model))
        pruner.detach()
        train(model, second(model))


def test_watching_ends_with_the_pruner() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    from dynaprune.pruning.checks import other_optimizers

    attached = set(other_optimizers._WATCHING)
    model = mlp()
    pruner = dynaprune.attach(model, adam(model), settings())
    assert set(other_optimizers._WATCHING) == attached | {pruner._others}
    assert sum(hook is other_optimizers._stepped for hook in hooks.values()) == 1
    with pytest.warns(RuntimeWarning, match="short of the target"):
        pruner.detach()
    assert set(other_optimizers._WATCHING) == attached
    assert sum(hook is other_optimizers._stepped for hook in hooks.values()) == bool(attached)
    pruner = dynaprune.attach(model, adam(model), settings())
    del pruner, model
    gc.collect()
    train(mlp(), adam(mlp()), 1)
    assert set(other_optimizers._WATCHING) == attached


def test_a_compiled_step_of_another_optimizer_has_the_graphs_that_it_had() -> None:
    def graphs() -> int:
        other, found = nn.Linear(4, 4), []
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        other(torch.ones(2, 4)).sum().backward()
        torch._dynamo.reset()
        torch.compile(optimizer.step, backend=lambda graph, _: found.append(1) or graph)()
        return len(found)

    before = graphs()
    model = mlp()
    pruner = dynaprune.attach(model, adam(model), settings())
    assert graphs() == before > 0
    assert not pruner._others.steps
