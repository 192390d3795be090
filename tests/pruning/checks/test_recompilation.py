"""Shapes that change past torch.compile's recompilation limit are said, with advice that works."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dynaprune
from tests.pruning.attached import adam, batch, loss_of, mlp, settings, train

STEPS = 60
SAID = "pruning has changed the shapes of weights of the compiled model"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Backend:
    """Runs each graph as it is, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph


def many_events(**changes: Any) -> dynaprune.PruningConfig:
    """15 events, most of which give a layer another shape."""
    chosen = {"total_steps": STEPS, "interval": 2, "allocation": "uniform", "target_sparsity": 0.9, **changes}
    return settings(**chosen)


def wide() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


def run(model: nn.Module, step: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[str]:
    """Train by ``step(step_number) -> loss``; what was said of compilation."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for number in range(steps):
            optimizer.zero_grad()
            step(number).backward()
            optimizer.step()
    return [str(each.message) for each in record if SAID in str(each.message)]


@pytest.mark.parametrize(
    ("how", "neurons"),
    [("the model", False), ("the model", True), ("in place", False), ("a part", False), ("the step", False)],
)
def test_it_is_said_once_with_numbers(how: str, neurons: bool) -> None:
    model, backend = wide(), Backend()
    given: Any = model
    step: Any = lambda number: loss_of(given, number)  # noqa: E731
    if how == "the model":
        given = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "a part":
        model[2].compile(backend=backend)
    else:
        forward = torch.compile(lambda x: model(x), backend=backend)
        step = lambda number: nn.functional.cross_entropy(forward(batch(number)[0]), batch(number)[1])  # noqa: E731
    optimizer = adam(model)
    pruner = dynaprune.attach(
        given, optimizer, many_events(neurons=neurons), example_inputs=batch(0)[0] if neurons else None
    )
    said = run(model, step, optimizer)
    assert len(said) == 1 and pruner.target_reached
    numbers = re.search(r"at step (\d+), and will in up to (\d+) more events.*limit to (\d+) or", said[0])
    assert numbers is not None and "recompile_limit = 8 " in said[0]
    step_number, left, needed = map(int, numbers.groups())
    assert step_number <= 10 and left == -(-(STEPS // 2 - step_number) // 2) and needed == left + 2
    assert 8 <= backend.graphs <= 9  # compiled in place, the hooks of the first batch cost one more


def test_the_advice_to_let_shapes_change() -> None:
    model, backend = wide(), Backend()
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        given = torch.compile(model, backend=backend)
        optimizer = adam(model)
        pruner = dynaprune.attach(
            given,
            optimizer,
            many_events(),
        )
        assert not run(model, lambda number: loss_of(given, number), optimizer)  # type: ignore[arg-type]
    assert pruner.target_reached and backend.graphs < 8


@pytest.mark.parametrize("neurons", [False, True])
def test_the_advice_to_raise_the_limit(neurons: bool) -> None:
    model, backend = wide(), Backend()
    with torch._dynamo.config.patch(recompile_limit=16, force_parameter_static_shapes=not neurons):
        given = torch.compile(model, backend=backend, fullgraph=True)
        optimizer = adam(model)
        pruner = dynaprune.attach(
            given,  # type: ignore[arg-type]
            optimizer,
            many_events(neurons=neurons),
            example_inputs=batch(0)[0],
        )
        assert not run(model, lambda number: loss_of(given, number), optimizer)  # type: ignore[arg-type]
    assert pruner.target_reached and 8 < backend.graphs <= 16


def test_cuts_of_neurons_compile_anew_whatever_is_set() -> None:
    model = wide()
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        given = torch.compile(model, backend="eager")
        optimizer = adam(model)
        dynaprune.attach(given, optimizer, many_events(neurons=True), example_inputs=batch(0)[0])  # type: ignore[arg-type]
        assert len(run(model, lambda number: loss_of(given, number), optimizer)) == 1  # type: ignore[arg-type]


def test_the_advice_to_compile_after_the_last_event() -> None:
    model, backend = wide(), Backend()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, many_events(neurons=True))
    train(model, optimizer, STEPS)
    assert pruner.structure_final
    given = torch.compile(model, backend=backend, fullgraph=True)
    assert not run(model, lambda number: loss_of(given, number), optimizer, 10)  # type: ignore[arg-type]
    assert backend.graphs == 1


@pytest.mark.parametrize("changes", [{"interval": 6}, {"compact": False}])
def test_few_events_and_shapes_that_stay_say_nothing(changes: dict[str, Any]) -> None:
    model, backend = mlp(), Backend()
    given = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = adam(model)
    pruner = dynaprune.attach(given, optimizer, many_events(**changes))  # type: ignore[arg-type]
    assert not run(model, lambda number: loss_of(given, number), optimizer)  # type: ignore[arg-type]
    assert pruner.target_reached and backend.graphs <= 8


def test_neurons_of_a_compiled_model_need_example_inputs_and_that_is_said_once() -> None:
    model = wide()
    given = torch.compile(model, backend="eager")
    optimizer = adam(model)
    pruner = dynaprune.attach(given, optimizer, many_events(neurons=True, compact=False))  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="dead neurons stay .* give attach its example_inputs") as record:
        train(given, optimizer, STEPS)  # type: ignore[arg-type]
    assert len([each for each in record if "dead neurons stay" in str(each.message)]) == 1
    assert "example_inputs" in pruner.report()["neurons_refused"]["the whole model"]
    assert pruner.ledger.neurons == 0


def test_uncompiled_models_say_nothing() -> None:
    other = torch.compile(nn.Linear(4, 4), backend="eager")
    other(torch.ones(2, 4))
    model = wide()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, many_events())
    assert not run(model, lambda number: loss_of(model, number), optimizer)
