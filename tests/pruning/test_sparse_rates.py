"""The learning rate of sparse layers: the rule, the groups, and what the optimizer sees at a step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR

import dynaprune
from dynaprune.pruning.learning_rate import MARK, rate_multiplier
from tests.pruning.attached import adam, assert_equal, dense_weights, loss_of, mlp, sparse_layers, train
from tests.pruning.test_sparse_start import settings

RATE = 1e-2


def config(**changes: Any) -> dynaprune.PruningConfig:
    """A quarter of the blocks, so that the rate is four times as high."""
    return settings(**{"initial_sparsity": 0.75, "target_sparsity": 0.75, **changes})


class Seen:
    """Notes, at each step of an optimizer, the settings that every parameter is stepped with; make it before
    the pruner."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps: list[dict[int, tuple[float, float]]] = []
        optimizer.register_step_post_hook(self._note)

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        self.steps.append({id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})

    def ratios(self, model: nn.Module) -> list[tuple[float, float]]:
        """Of each step, the rate and the decay of the block values over those of the rest."""
        fast = {id(layer.values) for layer in sparse_layers(model)}
        found = []
        for seen in self.steps:
            assert seen.keys() == {id(p) for p in model.parameters()}
            mine, rest = ({v for k, v in seen.items() if (k in fast) is which} for which in (True, False))
            assert len(mine) == len(rest) == 1
            (rate, decay), (slow, full) = mine.pop(), rest.pop()
            found.append((rate / slow if slow else math.nan, decay / full))
        return found


class Own(torch.optim.Optimizer):
    """An optimizer without a rate, or one that counts its steps in its groups."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if "k" in group:
                group["k"] += 1


def test_the_rule() -> None:
    given = [1.0, 0.9, 0.5, 0.25, 0.2002, 0.1999, 0.1, 0.05, 0.001]
    assert [rate_multiplier(d) for d in given] == [1.0, 1.1, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    assert rate_multiplier(0.5, 3.0) == 3.0 and rate_multiplier(1.0, 3.0) == 1.0
    for wrong, match in ((0.0, "above 0"), ("fast", "'auto' or a number, got 'fast'"), (math.nan, "finite")):
        with pytest.raises(ValueError, match=match):
            dynaprune.SparseStart(0.5, sparse_learning_rate=wrong)
    with pytest.raises(TypeError, match="sparse_learning_rate to be a number"):
        dynaprune.SparseStart(0.5, sparse_learning_rate=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("setting", "multiplier"), [("auto", 4.0), (2.5, 2.5)])
def test_groups_are_exact(setting: Any, multiplier: float) -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, config(sparse_learning_rate=setting))
    rest, fast = prepared.parameter_groups(lr=RATE, weight_decay=0.1)
    assert (rest["lr"], rest["weight_decay"]) == (RATE, 0.1)
    assert (fast["lr"], fast["weight_decay"]) == (RATE * multiplier, 0.1 / multiplier)
    assert [id(p) for p in fast["params"]] == [id(layer.values) for layer in sparse_layers(model)]
    assert {id(p) for p in (*rest["params"], *fast["params"])} == {id(p) for p in model.parameters()}
    assert (rest[MARK], fast[MARK]) == (1.0, multiplier)


def test_groups_of_the_users_own_are_split() -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, config())
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    own = [{"params": weights, "weight_decay": 0.2, "lr": 1.0}, {"params": iter(biases), "betas": (0.5, 0.6)}]
    head, fast, plain = prepared.parameter_groups(own, lr=RATE)
    assert head["params"] == [model[4].weight] and (head["lr"], head["weight_decay"]) == (1.0, 0.2)
    assert (fast["lr"], fast["weight_decay"], len(fast["params"])) == (4.0, 0.05, 2)
    assert plain == {"params": biases, "lr": RATE, "weight_decay": 0.0, "betas": (0.5, 0.6)}
    torch.optim.AdamW([head, fast, plain])
    with pytest.raises(ValueError, match="expected a learning rate in the parameter group"):
        prepared.parameter_groups()


def test_groups_may_hold_names_or_a_single_parameter() -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, config())
    named = prepared.parameter_groups([{"params": model.named_parameters()}], lr=RATE)
    optimizer = torch.optim.SGD(named)
    names = {group["lr"]: group["param_names"] for group in optimizer.param_groups}
    assert names[4 * RATE] == [name for name, _ in model.named_parameters() if name.endswith("values")]
    (alone,) = prepared.parameter_groups([{"params": model[0].values}], lr=RATE)
    assert alone["params"] == [model[0].values] and alone["lr"] == 4 * RATE


def test_what_begins_dense_or_is_turned_off_has_one_group() -> None:
    for changed in ({"initial_sparsity": 0.0}, {"sparse_learning_rate": 1.0}):
        model = mlp()
        prepared = dynaprune.prepare(model, config(**changed))
        (group,) = prepared.parameter_groups(lr=RATE)
        assert len(group["params"]) == 6 and MARK not in group
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        seen = Seen(optimizer)
        dynaprune.attach(prepared, optimizer)
        train(model, optimizer, 2)
        assert {values for step in seen.steps for values in step.values()} == {(RATE, 0.01)}


def test_each_layer_has_the_rate_of_its_own_density() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    prepared = dynaprune.prepare(model, config(initial_sparsity=0.7, target_sparsity=0.7, floors={"2": 0.5}))
    assert prepared.rates == {"0": 4.0, "2": 2.0}
    assert [group[MARK] for group in prepared.parameter_groups(lr=RATE)] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: min(step / 3, 1.0)),
        lambda o: CosineAnnealingLR(o, 12),
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=12),
        lambda o: CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
        lambda o: None,
    ],
    ids=["lambda", "cosine", "one cycle", "cyclic", "none"],
)
def test_schedulers_keep_the_ratio_made_before_or_after(schedule: Any, first: bool) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    seen = Seen(optimizer)
    scheduler = schedule(optimizer) if first else None
    dynaprune.attach(model, optimizer, config())
    scheduler = scheduler or schedule(optimizer)
    saved = copy.deepcopy(optimizer.state_dict()["param_groups"])
    train(model, optimizer, 10, after=scheduler.step if scheduler else lambda: None)
    for rate, decay in seen.ratios(model):
        assert (math.isnan(rate) or rate == pytest.approx(4.0, rel=1e-12)) and decay == 0.25
    assert len(optimizer.param_groups) == 1 and len(optimizer.state_dict()["param_groups"]) == len(saved)
    assert scheduler is None or len({tuple(step.values()) for step in seen.steps}) > 2


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: min(step / 3, 1.0)),
        lambda o: CosineAnnealingLR(o, 12),
        lambda o: OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=12),
    ],
)
def test_schedulers_keep_the_ratio_of_groups(schedule: Any) -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, config())
    optimizer = torch.optim.AdamW(prepared.parameter_groups(lr=RATE, weight_decay=0.1))
    seen = Seen(optimizer)
    scheduler = schedule(optimizer)
    dynaprune.attach(prepared, optimizer)
    train(model, optimizer, 10, after=scheduler.step)
    for rate, decay in seen.ratios(model):
        assert (math.isnan(rate) or rate == pytest.approx(4.0, rel=1e-12)) and decay == 0.25


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=12),
        lambda o: CyclicLR(o, 1e-3, 1e-2, cycle_momentum=False),
    ],
)
def test_a_scheduler_that_erases_the_multipliers_of_groups_is_refused(schedule: Any) -> None:
    model = mlp()
    prepared = dynaprune.prepare(model, config())
    optimizer = torch.optim.AdamW(prepared.parameter_groups(lr=RATE))
    dynaprune.attach(prepared, optimizer)
    schedule(optimizer)
    with pytest.raises(RuntimeError, match=r"no longer 4.0 times.*max_lr=\[group\['lr'\]"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=RATE, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=RATE, weight_decay=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(RATE), weight_decay=0.1),
    ],
    ids=["adamw", "fused", "adam", "sgd", "tensor rate"],
)
def test_one_line_and_groups_are_the_same_training(make: Any) -> None:
    def trained(by_groups: bool) -> tuple[list[Tensor], torch.optim.Optimizer]:
        model = mlp()
        prepared = dynaprune.prepare(model, config(target_sparsity=0.85))
        if by_groups:
            rate = make(list(mlp().parameters())).param_groups[0]["lr"]
            optimizer = make(prepared.parameter_groups(lr=rate, weight_decay=0.1))
        else:
            optimizer = make(model.parameters())
        pruner = dynaprune.attach(prepared, optimizer)
        train(model, optimizer)
        assert pruner.target_reached
        assert pruner.report()["learning_rate_multipliers"] == {"0": 4.0, "2": 4.0}
        return dense_weights(model), optimizer

    one, first = trained(False)
    other, second = trained(True)
    assert_equal(one, other)
    assert (len(first.param_groups), len(second.param_groups)) == (1, 2)


def test_decay_is_as_fast_as_at_rate_one() -> None:
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        model = mlp()
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.5)
        dynaprune.attach(model, optimizer, config())
        before = dense_weights(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for now, then in zip(dense_weights(model), before, strict=True):
            torch.testing.assert_close(now, then * (1 - 0.1 * 0.5))


def test_a_resumed_training_has_the_rates_that_it_began_with(tmp_path: Any) -> None:
    def start(model: nn.Module) -> tuple[torch.optim.Optimizer, dynaprune.Pruner]:
        optimizer = adam(model, weight_decay=0.1)
        seen.append(Seen(optimizer))
        return optimizer, dynaprune.attach(model, optimizer, config(target_sparsity=0.9))

    seen: list[Seen] = []
    model = mlp()
    optimizer, pruner = start(model)
    train(model, optimizer, 14)
    dynaprune.save(model, tmp_path / "model.safetensors")
    states = copy.deepcopy((optimizer.state_dict(), pruner.state_dict()))
    train(model, optimizer, 10, 14)
    loaded = dynaprune.load(mlp(), tmp_path / "model.safetensors")
    optimizer, again = start(loaded)
    optimizer.load_state_dict(states[0])
    again.load_state_dict(states[1])
    train(loaded, optimizer, 10, 14)
    assert_equal(dense_weights(loaded), dense_weights(model))
    assert set(seen[1].ratios(loaded)) == {(4.0, 0.25)}


def test_groups_are_whole_after_an_error_and_after_detach() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if len(self.param_groups) > 1 and self.defaults.pop("fail", False):
                raise ArithmeticError("no")
            return super().step(closure)

    model = mlp()
    optimizer = Fails(model.parameters(), lr=RATE)
    pruner = dynaprune.attach(model, optimizer, config())
    loss_of(model, 0).backward()
    optimizer.defaults["fail"] = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    optimizer.defaults["fail"] = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    pruner.detach()
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 6


def test_a_state_saved_after_an_error_has_the_groups_of_the_user() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    dynaprune.attach(model, optimizer, config())
    whole = optimizer.state_dict()["param_groups"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for saves in (True, False):
        saved = optimizer.state_dict()
        loss_of(model, 0).backward()
        handle = optimizer.register_step_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        handle.remove()
        if not saves:
            optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["param_groups"] == whole


def test_in_a_closure_the_groups_are_those_of_the_user() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    seen = Seen(optimizer)
    dynaprune.attach(model, optimizer, config())
    rates = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, len(rates))
        loss.backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        schedule.step()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert [len(each) for each in rates] == [1, 1, 1]
    assert {round(rate, 6) for rate, _ in seen.ratios(model)} == {4.0}


def test_an_optimizer_that_keeps_numbers_in_its_groups_needs_groups() -> None:
    model = mlp()
    optimizer = Own(model.parameters(), {"lr": RATE, "k": 0})
    dynaprune.attach(model, optimizer, config())
    match = r"numbers of its own in its parameter groups \(k\).*parameter_groups"
    with pytest.raises(RuntimeError, match=match):
        train(model, optimizer, 1)
    assert len(optimizer.param_groups) == 1
    model = mlp()
    prepared = dynaprune.prepare(model, config())
    optimizer = Own(prepared.parameter_groups(lr=RATE), {"k": 0})
    dynaprune.attach(prepared, optimizer)
    train(model, optimizer, 3)
    assert [group["k"] for group in optimizer.param_groups] == [3, 3]


def test_an_optimizer_without_a_rate_is_told() -> None:
    model = mlp()
    optimizer = Own(model.parameters(), {})
    with pytest.raises(ValueError, match=r"expected a learning rate.*sparse_learning_rate=1.0"):
        dynaprune.attach(model, optimizer, config())
    dynaprune.attach(model, optimizer, config(sparse_learning_rate=1.0))


def test_a_scaler_skips_steps_of_every_group() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    dynaprune.attach(model, optimizer, config())
    before = dense_weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(dense_weights(model), before)
