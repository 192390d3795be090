"""Pruning events: what a trial decides, what it leaves behind (nothing), regrowth, resumption, the report."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from tests.pruning.attached import (
    BLOCKS,
    STEPS,
    adam,
    assert_equal,
    batch,
    dense_weights,
    loss_of,
    mlp,
    settings,
    sparse_layers,
    train,
)


class Verdict:
    """Per-sample losses of 256 samples that rise by ``harm`` per suspended or removed block beyond
    ``free``."""

    def __init__(self, model: nn.Module, harm: float = 0.0, free: int = 10**9) -> None:
        self.model, self.harm, self.free = model, harm, free
        self.noise = 1 + 0.1 * torch.rand(256, generator=torch.Generator().manual_seed(3))
        self.densities: list[float] = []
        self.redrawn = 0

    def redraw(self) -> None:
        self.redrawn += 1

    def __call__(self) -> Tensor:
        live = sum(layer.layout.live_count() for layer in sparse_layers(self.model))
        assert not self.model.training and not torch.is_grad_enabled()
        self.densities.append(live / BLOCKS)
        return self.noise + self.harm * max(0, BLOCKS - live - self.free)


def test_what_passes_the_trial_goes() -> None:
    model = mlp()
    optimizer, trial = adam(model), Verdict(model)
    pruner = dynaprune.attach(model, optimizer, settings(), trial=trial)
    train(model, optimizer)
    report = pruner.report()
    assert report["removed_passed"] == report["blocks_removed"] == 72
    assert report["removed_forced"] == report["removed_untested"] == 0
    assert report["trials"]["tested"] and report["trials"]["accepted"] == len(report["trials"]["events"])
    assert trial.redrawn == report["trials"]["count"]
    assert all(event["p_values"][0] < 0.01 / 3 for event in report["trials"]["events"])


def test_what_fails_is_carried_over_and_forced_at_most_a_tenth_at_a_time() -> None:
    model = mlp()
    optimizer = adam(model)
    config = settings(total_steps=120, interval=4)
    pruner = dynaprune.attach(model, optimizer, config, trial=Verdict(model, harm=1.0, free=0))
    densities = []
    for step in range(120):
        train(model, optimizer, 1, step)
        densities.append(1 - pruner.sparsity)
    report = pruner.report()
    assert report["removed_passed"] == report["removed_untested"] == 0
    assert report["removed_forced"] == report["blocks_removed"] == 72 and report["target_reached"]
    for before, after in itertools.pairwise(densities):
        assert before - after <= 0.1 * before + 1e-9
    first = report["trials"]["events"][0]
    assert first["passed"] == 0 and len(first["p_values"]) == 3


def test_the_largest_candidate_that_passes_goes() -> None:
    model = mlp()
    optimizer = adam(model)
    trial = Verdict(model, harm=1.0, free=9)
    config = settings(interval=12, start=0.0, end=0.5)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial)
    train(model, optimizer, 12)
    event = pruner.report()["trials"]["events"][0]
    assert event["wish"] == 72 and event["passed"] == 0
    assert trial.densities == [1.0, 24 / 96, 60 / 96, 78 / 96]
    live = BLOCKS - event["forced"]
    wish = live - 24
    trial.free = event["forced"] + 2
    trial.densities.clear()
    train(model, optimizer, pruner.policy.pace.catch_up_interval, 12)
    event = pruner.report()["trials"]["events"][1]
    assert trial.densities == [n / 96 for n in (live, live - 9, live - 4, live - 2)]  # 9 is half of 18
    assert (event["wish"], event["passed"]) == (wish, 2)


class Noisy(nn.Module):
    """Dropout and batch norm: random state and buffers that a trial could disturb."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(32, 64)
        self.norm = nn.BatchNorm1d(64)
        self.dropout = nn.Dropout(0.3)
        self.second = nn.Linear(64, 64)
        self.last = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.first(x)).relu())
        return self.last(nn.functional.dropout(self.second(x).relu(), 0.2, self.training))


@pytest.mark.parametrize("own", [True, False])
def test_a_trial_that_rejects_changes_nothing(own: bool) -> None:
    """Weights, buffers, random state and what follows are bit for bit those of training without trials."""

    def run(with_trial: bool) -> tuple[nn.Module, Any, Tensor]:
        model = Noisy()
        optimizer = adam(model)
        torch.manual_seed(11)

        def losses(network: nn.Module, part: Any) -> Tensor:
            torch.rand(2)
            suspended = BLOCKS - sum(layer.layout.live_count() for layer in sparse_layers(model))
            return nn.functional.cross_entropy(network(part[0]), part[1], reduction="none") + suspended

        x, y = batch(99, rows=128)
        trial: Any = lambda: losses(model, (x, y))  # noqa: E731
        if own:
            dataset = torch.utils.data.TensorDataset(x, y)
            trial = dynaprune.CalibrationTrial(model, dataset, losses, samples=128, batch_size=64)
        schedule = {"target_sparsity": None, "interval": 2 if with_trial else 1000}
        pruner = dynaprune.attach(model, optimizer, settings(**schedule), trial=trial)
        train(model, optimizer, 12)
        assert len(pruner.report()["trials"]["events"]) == (5 if with_trial else 0)
        assert pruner.sparsity == 0.0
        return model, optimizer.state_dict(), torch.get_rng_state()

    tested, tested_state, tested_random = run(True)
    untested, untested_state, untested_random = run(False)
    assert_equal(list(tested.state_dict().values()), list(untested.state_dict().values()))
    assert torch.equal(tested_random, untested_random)
    for key, state in untested_state["state"].items():
        assert all(torch.equal(value, tested_state["state"][key][name]) for name, value in state.items())
    for mine, other in zip(sparse_layers(tested), sparse_layers(untested), strict=True):
        assert torch.equal(mine.layout.index, other.layout.index)


def test_a_trial_that_fails_leaves_the_model_whole() -> None:
    model = mlp()
    optimizer = adam(model)
    trial = Verdict(model)
    calls = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the calibration data went away")
        return trial()

    dynaprune.attach(model, optimizer, settings(), trial=failing)
    with pytest.raises(OSError, match="went away"):
        train(model, optimizer)
    assert all(layer.density() == 1.0 for layer in sparse_layers(model)) and model.training


def test_planted_useless_units_are_found() -> None:
    """Half of the inputs are always zero: the blocks that read them do nothing, and nothing else does."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    x[:, 32:] = 0
    y = (x[:, :8].view(-1, 4, 2).sum(2)).argmax(1)
    dataset = torch.utils.data.TensorDataset(x[1024:], y[1024:])
    trial = dynaprune.CalibrationTrial(
        model, dataset, lambda net, b: (nn.functional.cross_entropy(net(b[0]), b[1], reduction="none"), b[1])
    )
    config = settings(target_sparsity=None, include=["0"], interval=5, total_steps=100, start=0.1, end=0.6)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial)
    for step in range(100):
        optimizer.zero_grad()
        part = slice(step * 32 % 1024, step * 32 % 1024 + 32)
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    useless = ~model[0].layout.mask[:, 4:]
    assert float(useless.float().mean()) >= 0.9
    assert pruner.report()["removed_forced"] == 0


def test_planted_useless_neurons_are_cut() -> None:
    """Nothing reads the first 24 of 64 hidden neurons; the trial finds them and they leave the network."""
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, :24] = 0
    rows = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    dataset = torch.utils.data.TensorDataset(*batch(7, rows=1024))
    losses: Any = lambda net, b: (nn.functional.cross_entropy(net(b[0]), b[1], reduction="none"), b[1])  # noqa: E731
    trial = dynaprune.CalibrationTrial(model, dataset, losses)
    config = settings(target_sparsity=None, neurons=True, total_steps=200, interval=5, end=0.6)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial)
    train(model, optimizer, 120)
    left = {tuple(row.tolist()) for row in model[0].weight}
    assert sum(tuple(row.tolist()) in left for row in rows[:24]) <= 2
    report = pruner.report()
    assert report["neurons_removed"] >= 22 and report["removed_forced"] == report["removed_untested"] == 0
    assert model[2].layout.in_features == model[0].layout.out_features == len(left)


@pytest.mark.parametrize("scaled", [False, True])
def test_blocks_grow_back_where_the_gradient_is(scaled: bool) -> None:
    model = mlp()
    optimizer = adam(model)
    config = settings(total_steps=60, regrow=0.5, interval=3, end=0.6)
    pruner = dynaprune.attach(model, optimizer, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
    grown: list[tuple[int, Tensor]] = []
    for step in range(60):
        masks = [layer.layout.mask.clone() for layer in sparse_layers(model)]
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        probing = [bool(layer.probe) for layer in sparse_layers(model)]
        assert set(probing) == {pruner.policy.pace.due(step + 1) and not pruner.nothing_left()}
        scaler.step(optimizer)
        scaler.update()
        for layer, mask in zip(sparse_layers(model), masks, strict=True):
            new = layer.layout.mask & ~mask
            assert not layer.to_blocks(layer.weight)[new.view(-1)].any()
            if new.any():
                grown.append((step, new))
            assert layer.tap is None if pruner.nothing_left() else layer.tap.grad is None
    report = pruner.report()
    assert report["blocks_regrown"] == sum(int(new.sum()) for _, new in grown) > 8
    assert report["blocks_removed"] == report["removed_untested"] - report["blocks_regrown"] == 72
    live = sum(layer.layout.live_count() for layer in sparse_layers(model))
    assert live == 24 == sum(layer.layout.capacity for layer in sparse_layers(model))


def test_blocks_that_returned_are_safe_for_one_interval() -> None:
    model = mlp()
    optimizer = adam(model)
    config = settings(total_steps=60, regrow=0.9, interval=4, end=0.6, score="random")
    pruner = dynaprune.attach(model, optimizer, config)
    fresh: dict[str, Tensor] = {}
    checked = 0
    for step in range(60):
        before = {name: layer.layout.mask.clone() for name, layer in pruner.layers.items()}
        train(model, optimizer, 1, step)
        if pruner.policy.pace.due(step + 1):
            for name, layer in pruner.layers.items():
                if name in fresh:
                    assert layer.layout.mask[fresh[name]].all()
                    checked += int(fresh[name].sum())
                fresh[name] = layer.layout.mask & ~before[name]
    assert checked > 10


def test_the_report_is_plain_and_complete() -> None:
    model = mlp()
    optimizer, trial = adam(model), Verdict(model, harm=0.01, free=30)
    pruner = dynaprune.attach(model, optimizer, settings(), trial=trial)
    train(model, optimizer)
    report = json.loads(json.dumps(pruner.report(), allow_nan=False))
    removed = report["removed_passed"] + report["removed_forced"] + report["removed_untested"]
    assert removed == report["blocks_removed"] and report["blocks_total"] == BLOCKS
    assert report["layers"]["4"] == {
        "density": 1.0,
        "exempt": "the classifier (the last Linear) stays dense unless named",
        "weights": 4 * 64,
    }
    history = report["history"]
    assert history[0] == {"step": 0, "sparsity": 0.0, "density": {"0": 1.0, "2": 1.0}}
    assert [row["sparsity"] for row in history] == sorted(row["sparsity"] for row in history)
    assert history[-1]["sparsity"] == report["sparsity"]
    live = {name: layer.density() for name, layer in pruner.layers.items()}
    assert history[-1]["density"] == {name: report["layers"][name]["density"] for name in live} == live
    assert report["trials"]["seconds"] > 0 and 0 < report["observing"]["share"] < 1
    assert 12 < report["observing"]["observations"] <= STEPS


def test_nothing_is_observed_once_there_is_nothing_left_to_do() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(regrow=0.3))
    train(model, optimizer)
    report = pruner.report()
    assert report["target_reached"] and report["structure_final"]
    assert report["observing"]["observations"] == STEPS // 2
    assert all(layer.tap is None and not layer.probe for layer in sparse_layers(model))


def test_a_run_cut_short_has_not_reached_its_target() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings())
    train(model, optimizer, 7)
    report = pruner.report()
    assert 0 < report["sparsity"] < 0.75
    assert report["target_reached"] is False and report["structure_final"] is False


def test_observing_is_spread_out_where_steps_are_cheap_and_never_by_the_clock() -> None:
    """The period comes from sizes: few rows per weight make it long, many make it 1."""
    periods = {}
    for rows in (4, 4096):
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        config = settings(observe_every=None, total_steps=2000, interval=200, block_size=32)
        pruner = dynaprune.attach(model, optimizer, config)
        for _ in range(2):
            model(torch.randn(rows, 256)).sum().backward()
            optimizer.step()
        periods[rows] = pruner.observer.every
    assert periods[4] > 4 and periods[4096] <= 2


def test_neurons_are_cut_with_their_optimizer_state() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(neurons=True, target_sparsity=0.85))
    train(model, optimizer)
    report = pruner.report()
    assert report["neurons_removed"] >= 8 and report["target_reached"]
    assert report["neurons_removed"] == 128 - model[0].layout.out_features - model[2].layout.out_features
    assert model[2].layout.in_features == model[0].layout.out_features
    assert model[4].in_features == model[2].layout.out_features
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    outputs = model(batch(0)[0])
    plain = pruner.finalize()
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    torch.testing.assert_close(plain(batch(0)[0]), outputs)
    train(plain, optimizer, 3)


def test_a_model_that_cannot_be_traced_keeps_its_neurons_and_says_so() -> None:
    model = mlp()
    optimizer = adam(model)
    config = settings(neurons=True)
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=torch.zeros(2, 7))
    with pytest.warns(RuntimeWarning, match="dead neurons stay in the network: the model cannot be traced"):
        train(model, optimizer)
    report = pruner.report()
    assert report["neurons_removed"] == 0 and report["target_reached"]
    assert "the model cannot be traced" in report["neurons_refused"]["the whole model"]
    assert model.training and torch.isfinite(model(batch(0)[0])).all()


def test_dense_weights_are_the_starting_point() -> None:
    model, reference = mlp(), mlp()
    weights = dense_weights(reference)
    dynaprune.attach(model, adam(model), settings())
    assert_equal(dense_weights(model), weights)
