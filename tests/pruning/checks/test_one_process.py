"""DistributedDataParallel in a process group of one: pruned as without it, wherever it is."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import dynaprune
from tests.pruning.attached import STEPS, adam, batch, dense_weights, loss_of, mlp, settings, train
from tests.rounding import agree

EXACT = torch.float64
TOLERANCE = 2**12 * torch.finfo(EXACT).eps


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """What was there before the test is frozen, so that looking for wrappers goes through little."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    gc.freeze()
    yield
    gc.unfreeze()
    distributed.destroy_process_group()


def network() -> nn.Sequential:
    """With a norm between the layers, whose statistics are cut along with its neurons."""
    torch.manual_seed(1)
    layers = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 4)).to(EXACT)


def double_train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step, EXACT).backward()
        optimizer.step()


def config() -> dynaprune.PruningConfig:
    return settings(neurons=True, allocation="uniform")


@functools.cache
def alone() -> tuple[dynaprune.Pruner, nn.Module]:
    model = network()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, config())
    double_train(model, optimizer, STEPS)
    return pruner, model


def assert_trained_alike(pruner: dynaprune.Pruner) -> None:
    """As without the wrapper: the same blocks, the same weights up to rounding."""
    reference, model = alone()
    assert pruner.target_reached and pruner.density() == reference.density()
    assert pruner.compactions == reference.compactions > 0
    for mine, theirs in zip(dense_weights(pruner.model), dense_weights(model), strict=True):
        assert torch.allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().max()))


def around(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"broadcast_buffers": False, "bucket_cap_mb": 1},
]


@pytest.mark.parametrize(
    ("options", "given"), [*((options, "the wrapper") for options in OPTIONS), ({}, "the model in it")]
)
def test_a_wrapped_model(options: dict[str, Any], given: str) -> None:
    wrapper = around(network(), **options)
    optimizer = adam(wrapper)
    model = wrapper if given == "the wrapper" else wrapper.module
    pruner = dynaprune.attach(model, optimizer, config())
    assert pruner.model is wrapper.module
    double_train(wrapper, optimizer, STEPS)
    assert_trained_alike(pruner)
    assert pruner.finalize() is model
    double_train(wrapper, optimizer, 2)


@pytest.mark.parametrize(("options", "steps"), [*((options, 4) for options in OPTIONS), ({}, 0)])
def test_a_model_that_is_wrapped_after_attach(options: dict[str, Any], steps: int) -> None:
    model = network()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, config())
    double_train(model, optimizer, steps)
    double_train(around(model, **options), optimizer, STEPS - steps, steps)
    assert_trained_alike(pruner)


def test_what_contains_the_model_may_be_wrapped() -> None:
    inner = network()
    wrapper = around(nn.Sequential(inner, nn.Identity()))
    optimizer = adam(wrapper)
    pruner = dynaprune.attach(inner, optimizer, config())
    double_train(wrapper, optimizer, STEPS)
    assert_trained_alike(pruner)


@pytest.mark.parametrize("wrapped", ["compiled in the wrapper", "the wrapper compiled"])
def test_with_compilation(wrapped: str) -> None:
    torch._dynamo.reset()
    model: Any = network()
    if wrapped == "compiled in the wrapper":
        model = around(torch.compile(model, backend="aot_eager"))  # type: ignore[arg-type]
    else:
        model = torch.compile(around(model), backend="aot_eager")
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, config(), example_inputs=batch(0, EXACT)[0])
    assert isinstance(pruner.model, nn.Sequential)
    double_train(model, optimizer, STEPS)
    assert_trained_alike(pruner)


@pytest.mark.parametrize("before", ["steps", "a forward without a backward", "half an accumulation"])
def test_in_the_middle_of_a_training(before: str) -> None:
    """The wrapper has rebuilt its buckets, or waits for gradients."""
    wrapper, plain = around(network()), network()
    optimizers = adam(wrapper), adam(plain)
    for model, optimizer in zip((wrapper, plain), optimizers, strict=True):
        double_train(model, optimizer, 3)
        if before != "steps":
            loss = model(torch.ones(4, 32, dtype=EXACT)).sum()
            if before == "half an accumulation":
                loss.backward()
        pruner = dynaprune.attach(model, optimizer, config())
        double_train(model, optimizer, STEPS, 3)
        assert pruner.target_reached
    for mine, theirs in zip(dense_weights(wrapper.module), dense_weights(plain), strict=True):
        assert torch.allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().max()))


def test_accumulation_with_and_without_no_sync() -> None:
    wrapper = around(network())
    optimizer = adam(wrapper)
    pruner = dynaprune.attach(wrapper, optimizer, config())
    x = torch.randn(8, 32, dtype=EXACT)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with wrapper.no_sync():
            wrapper(x).square().mean().backward()
        wrapper.require_backward_grad_sync = True  # as accelerate's trigger_sync_in_backward
        wrapper(x).square().mean().backward()
        plain = copy.deepcopy(wrapper.module)
        plain.zero_grad()
        (2 * plain(x).square().mean()).backward()
        for mine, theirs in zip(wrapper.module.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            assert torch.allclose(mine.grad, theirs.grad, rtol=TOLERANCE, atol=TOLERANCE)
        optimizer.step()
    assert pruner.target_reached


@pytest.mark.parametrize("given", ["the wrapper", "the model in it"])
@pytest.mark.parametrize("steps", [0, 4])
def test_static_graphs_are_refused_with_advice_that_works(given: str, steps: int) -> None:
    model = network()
    optimizer = adam(model)
    if steps:
        pruner = dynaprune.attach(model, optimizer, config())
        double_train(model, optimizer, steps)
        wrapper = around(model, static_graph=True)
        with pytest.raises(ValueError, match="static_graph=True promises that no shape ever changes"):
            double_train(wrapper, optimizer, STEPS, steps)
        return
    wrapper = around(model, static_graph=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"static_graph=True .* leave it out"):
        dynaprune.attach(wrapper if given == "the wrapper" else model, optimizer, config())
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], value) for key, value in before.items())
    wrapper = around(model)
    pruner = dynaprune.attach(wrapper, optimizer, config())
    double_train(wrapper, optimizer, STEPS)
    assert_trained_alike(pruner)


def test_other_wrappers_keep_averaging() -> None:
    teacher = around(network())
    wrapper = around(network())
    optimizer = adam(wrapper)
    dynaprune.attach(wrapper, optimizer, config())
    double_train(wrapper, optimizer, STEPS)
    assert teacher.require_backward_grad_sync and not wrapper.require_backward_grad_sync
    double_train(teacher, adam(teacher), 3)


def test_saving_and_loading(tmp_path: Path) -> None:
    wrapper = around(mlp())
    optimizer = adam(wrapper)
    dynaprune.attach(wrapper, optimizer, settings())
    train(wrapper, optimizer)
    state = copy.deepcopy(wrapper.state_dict())
    x = torch.randn(5, 32)
    expected = wrapper(x)
    loaded = dynaprune.load(mlp, dynaprune.save(wrapper.module, tmp_path))
    assert agree(loaded(x), expected)
    other = around(mlp())
    second = adam(other)
    dynaprune.attach(other, second, settings())
    other.load_state_dict(state)
    assert agree(other(x), expected)
    second.load_state_dict(optimizer.state_dict())
    other(x).sum().backward()
    twin = copy.deepcopy(wrapper)
    twin(x).sum().backward()
