"""``attach`` with ``units="neurons"``: plain layers get narrower while they train, and stay plain."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune import BlockSparseLinear, Pruner, PruningConfig
from dynaprune.pruning.edit.edits import Cut
from tests.pruning.attached import adam, assert_equal, batch, loss_of, mlp, train

STEPS = 30
HIDDEN = ("0", "2")
Trial = Callable[[], tuple[Tensor, Tensor]]


def settings(**changes: Any) -> PruningConfig:
    """Half of the weights go with their neurons, in an event every third step up to half of training."""
    chosen: dict[str, Any] = {
        "units": "neurons", "target_sparsity": 0.5, "total_steps": STEPS, "interval": 3, "observe_every": 1,
        "trial_budget": None,
    }  # fmt: skip
    return PruningConfig(**{**chosen, **changes})


def trial_of(model: nn.Module, rows: int = 256) -> Trial:
    def trial() -> tuple[Tensor, Tensor]:
        x, y = batch(999, rows=rows)
        return nn.functional.cross_entropy(model(x), y, reduction="none"), y

    return trial


def widths(model: Any) -> list[tuple[int, int]]:
    return [(layer.out_features, layer.in_features) for layer in model if isinstance(layer, nn.Linear)]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Pruner, list[int], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mlp()
    parameters = [id(p) for p in model.parameters()]
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(), trial=trial_of(model), example_inputs=batch(0)[0])
    train(model, optimizer, STEPS)
    return model, pruner, parameters, optimizer


def test_layers_stay_plain_and_get_narrower(trained: Any) -> None:
    model, pruner, parameters, optimizer = trained
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    (first, inputs), (second, between), (classes, last) = widths(model)
    assert first < 64 and second < 64
    assert (inputs, between, last, classes) == (32, first, second, 4)
    assert [id(p) for p in model.parameters()] == parameters
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
    assert pruner.target_reached and 0.5 <= pruner.sparsity < 0.55


def test_the_target_counts_weights_in_rows_and_columns_of_neurons(trained: Any) -> None:
    model, pruner, _, _ = trained
    first = 32 * 64 + 64 * 64 + 64 * 4
    weights = sum(outputs * inputs for outputs, inputs in widths(model))
    assert pruner.structure.weights == first
    assert pruner.sparsity == pytest.approx(1 - weights / first)
    assert pruner.live_parameters == sum(p.numel() for p in model.parameters())


def test_the_report_tells_neurons_widths_and_reasons(trained: Any) -> None:
    model, pruner, _, _ = trained
    report = pruner.report()
    gone = 128 - sum(outputs for outputs, _ in widths(model)[:2])
    assert report["units"] == "neurons" and report["neurons_removed"] == gone
    assert report["removed_passed"] + report["removed_forced"] == gone and not report["removed_untested"]
    for why in ("passed", "forced", "untested"):
        assert report[f"neurons_{why}"] == report[f"removed_{why}"]
    assert report["blocks_total"] == report["blocks_removed"] == 0
    assert report["widths"]["2"] == {
        "outputs": widths(model)[1][0],
        "inputs": widths(model)[0][0],
        "outputs_at_first": 64,
        "inputs_at_first": 64,
    }
    assert report["neurons_refused"] == {"4": "its outputs are outputs of the model"}
    assert [report["layers"][name]["exempt"] for name in ("0", "2", "4")] == ["", "", ""]
    density = {name: report["layers"][name]["density"] for name in ("0", "2", "4")}
    assert density == pruner.density() == pruner.history[-1]["density"]
    assert report["parameters"]["prunable"] == pruner.structure.weights
    assert pruner.history[0] == {"step": 0, "sparsity": 0.0, "density": {"0": 1.0, "2": 1.0, "4": 1.0}}
    assert report["trials"]["count"] > 0
    assert 0 < pruner.figures()["flops_saving"] == pytest.approx(pruner.sparsity)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "Adam, fused": lambda p: torch.optim.Adam(p, 3e-3, weight_decay=1e-3, fused=True),
    "Adam, foreach, amsgrad": lambda p: torch.optim.Adam(p, 3e-3, amsgrad=True, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_the_masked_twin_does(name: str) -> None:
    """The twin trains dense, with weights and biases of neurons that are gone multiplied by zero."""
    double = torch.float64
    model, twin = mlp(double), mlp(double)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=batch(0, double)[0])
    left = {name: torch.arange(64) for name in HIDDEN}  # outputs that each layer still has, as at first

    def recorded(decide: Any) -> Any:
        def decides(view: Any) -> list[Cut]:
            edits: list[Cut] = decide(view)
            for edit in edits:
                assert edit.found.plan is not None
                for layer, (outputs, _) in edit.found.plan.layers.items():
                    if layer in left:
                        left[layer] = left[layer][~outputs]
            return edits

        return decides

    pruner.policy.decide = recorded(pruner.policy.decide)  # type: ignore[method-assign]
    for step in range(STEPS):
        before = dict(left)
        optimizer.zero_grad()
        loss_of(model, step, double).backward()
        optimizer.step()
        other.zero_grad()
        x, y = batch(step, double)
        for number, layer in enumerate(twin):
            x = layer(x)
            if str(number) in left:
                mask = torch.zeros(64, dtype=double)
                mask[before[str(number)]] = 1
                x = x * mask
        nn.functional.cross_entropy(x, y).backward()
        other.step()
    assert pruner.target_reached and min(len(index) for index in left.values()) < 50
    first, second = left["0"], left["2"]
    theirs = {
        "0.weight": twin[0].weight[first], "0.bias": twin[0].bias[first],
        "2.weight": twin[2].weight[second][:, first], "2.bias": twin[2].bias[second],
        "4.weight": twin[4].weight[:, second], "4.bias": twin[4].bias,
    }  # fmt: skip
    for key, parameter in model.named_parameters():
        expected = theirs[key].detach()
        assert parameter.shape == expected.shape
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-9)


def test_a_trial_that_raises_leaves_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = adam(model)
    calls = []

    def trial() -> Tensor:
        calls.append(model[0].weight.detach().clone())
        if len(calls) == 2:
            raise RuntimeError("no more losses")
        return nn.functional.cross_entropy(model(batch(999)[0]), batch(999)[1], reduction="none")

    dynaprune.attach(model, optimizer, settings(), trial=trial, example_inputs=batch(0)[0])
    with pytest.raises(RuntimeError, match="no more losses"):
        train(model, optimizer)
    silent, whole = calls[1], calls[0]
    assert not torch.equal(silent, whole) and bool((silent[silent != whole] == 0).all())
    assert torch.equal(model[0].weight.detach(), whole)


def test_it_works_without_the_extension() -> None:
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import dynaprune, torch\n"
        "from tests.pruning.test_attach_neurons import *\n"
        "model = mlp(); optimizer = adam(model)\n"
        "pruner = dynaprune.attach(model, optimizer, settings(), trial=trial_of(model))\n"
        "train(model, optimizer, STEPS)\n"
        "from dynaprune_kernels import _extension; assert not _extension.load().loaded\n"
        "assert pruner.target_reached and pruner.report()['neurons_removed'] > 20\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "DYNAPRUNE_DISABLE_EXT": "1", "PYTHONPATH": f"{root / 'python'}:{root}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_no_layer_loses_all_its_neurons(allocation: str) -> None:
    model = mlp()
    optimizer = adam(model)
    config = settings(target_sparsity=0.99, floor=0.0, floors={"2": 0.25}, allocation=allocation)
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=batch(0)[0])
    with pytest.warns(RuntimeWarning, match="out of reach: each layer keeps an output and its floor"):
        train(model, optimizer, STEPS)
    with pytest.warns(RuntimeWarning, match="pruning ends at a sparsity of 98"):
        pruner.finalize()
    assert widths(model) == [(1, 32), (16, 1), (4, 16)]
    assert torch.isfinite(model(batch(0)[0])).all()


def test_a_uniform_allocation_takes_the_same_share_of_every_layer() -> None:
    model = mlp()
    optimizer = adam(model)
    dynaprune.attach(model, optimizer, settings(allocation="uniform"), example_inputs=batch(0)[0])
    train(model, optimizer, STEPS)
    (first, _), (second, _), _ = widths(model)
    assert abs(first - second) <= 3 and first < 55


def test_excluded_layers_keep_their_outputs() -> None:
    model = mlp()
    optimizer = adam(model)
    config = settings(exclude=["2"])
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=batch(0)[0])
    train(model, optimizer, STEPS)
    assert widths(model) == [(32, 32), (64, 32), (4, 64)]
    assert pruner.exempt == {"2": "excluded by name"}
    assert pruner.structure.weights == 32 * 64 + 64 * 64  # the classifier reads no neuron that may go


def test_copies_follow() -> None:
    model = mlp()
    optimizer = adam(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    shadow = {f"module.{name}": p.detach().clone() for name, p in model.named_parameters()}
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=batch(0)[0])
    pruner.follow(average)
    pruner.follow(shadow)
    with pytest.raises(ValueError, match=r"a tensor for each weight, .* got none for 0.bias among \['0'\]"):
        pruner.follow({"0": torch.zeros(3)})
    with pytest.raises(ValueError, match="got the model itself"):
        pruner.follow(model)
    with pytest.raises(ValueError, match=r"expected 2 of the copy with the \(64, 64\) outputs and inputs"):
        pruner.follow(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        )

    def update() -> None:
        average.update_parameters(model)
        for name, parameter in model.named_parameters():
            shadow[f"module.{name}"].lerp_(parameter.detach(), 0.5)

    train(model, optimizer, STEPS, after=update)
    assert pruner.target_reached and widths(average.module) == widths(model)
    for (name, mine), other in zip(shadow.items(), average.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other.detach(), msg=name)


def test_a_copy_that_does_not_follow_is_no_longer_updated_in_silence() -> None:
    model = mlp()
    optimizer = adam(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    dynaprune.attach(model, optimizer, settings(), example_inputs=batch(0)[0])
    with pytest.raises(RuntimeError, match="size of tensor"):
        train(model, optimizer, STEPS, after=lambda: average.update_parameters(model))


@pytest.mark.parametrize("units", ["neurons", "both"])
def test_a_run_resumes_bit_for_bit(units: str, tmp_path: Path) -> None:
    config = settings(units=units, block_size=8)

    def started() -> tuple[Any, torch.optim.Optimizer, Pruner]:
        model = mlp()
        optimizer = adam(model)
        return model, optimizer, dynaprune.attach(model, optimizer, config, trial=trial_of(model, 64))

    whole, optimizer, reference = started()
    train(whole, optimizer, STEPS)
    model, optimizer, pruner = started()
    train(model, optimizer, 8)
    assert pruner.history[-1]["step"] == 7
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    model, optimizer, pruner = started()
    for part, state in zip((model, optimizer, pruner), saved, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, STEPS - 8, start=8)
    assert_equal(list(model.parameters()), list(whole.parameters()))
    assert pruner.history == reference.history
    assert pruner.ledger.removals() == reference.ledger.removals()
    path = dynaprune.save(model, tmp_path / "model.safetensors")
    loaded = dynaprune.load(mlp(), path)
    assert_equal(list(loaded.parameters()), list(model.parameters()))
    assert [type(layer) for layer in loaded] == [type(layer) for layer in model]
    torch.testing.assert_close(copy.deepcopy(model)(batch(3)[0]), model(batch(3)[0]))


def test_blocks_and_neurons_go_by_turns() -> None:
    model = mlp()
    optimizer = adam(model)
    config = settings(units="both", block_size=8, target_sparsity=0.7)
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=batch(0)[0])
    train(model, optimizer, 4)
    layer: Any = model[2]  # whole neurons first: of what is left no block is gone
    assert pruner.density()["2"] == layer.out_features * layer.in_features / 64**2 < 1
    assert layer.out_features % 8 == layer.in_features % 8 == 0 and layer.density() == 1
    blocks = pruner.report()["blocks_removed"]
    train(model, optimizer, STEPS - 4, start=4)
    report = pruner.report()
    assert pruner.target_reached and report["blocks_removed"] > blocks
    assert [type(layer) for layer in model][::2] == [BlockSparseLinear, BlockSparseLinear, nn.Linear]
    assert widths(model)[0] == (4, model[2].out_features) < (4, 64)
    assert report["neurons_removed"] == 128 - model[0].out_features - model[2].out_features > 0
    assert 0 < report["neurons_untested"] <= report["neurons_removed"]
    assert report["neurons_untested"] < report["removed_untested"]
    assert report["neurons_passed"] == report["neurons_forced"] == 0
    expected = model(batch(0)[0])
    plain = pruner.finalize()
    torch.testing.assert_close(plain(batch(0)[0]), expected)
    assert len(widths(plain)) == 3


def test_states_that_do_not_belong_together_are_refused() -> None:
    model = mlp()
    optimizer = adam(model)
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=batch(0)[0])
    train(model, optimizer, 8)
    state = pruner.state_dict()
    fresh = mlp()
    other = adam(fresh)
    again = dynaprune.attach(fresh, other, settings(), example_inputs=batch(0)[0])
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"saved when 0 had \[\d+, 32\] outputs and inputs, and it has"):
        train(fresh, other, 1)
    model = mlp()
    blocks = dynaprune.attach(model, adam(model), settings(units="blocks", block_size=8))
    with pytest.raises(ValueError, match=r"expected the state of layers \['0', '2'\], got \[\]"):
        blocks.load_state_dict(state)


def test_what_cannot_be_pruned_is_refused_with_the_reason() -> None:
    alone = nn.Sequential(nn.Linear(32, 4))
    with pytest.raises(ValueError, match="no neuron can go: 0: its outputs are outputs of the model"):
        dynaprune.attach(alone, adam(alone), settings(), example_inputs=batch(0)[0])
    optimizer = adam(alone)
    dynaprune.attach(alone, optimizer, settings())
    with pytest.raises(RuntimeError, match="no neuron can go: 0: its outputs are outputs of the model"):
        for step in range(4):
            loss_of(alone, step).backward()
            optimizer.step()
    frozen = mlp().requires_grad_(False)
    frozen[4].requires_grad_(True)
    with pytest.raises(ValueError, match="expected a layer whose neurons may go, got none"):
        dynaprune.attach(frozen, adam(frozen), settings(exclude=["4"]))
    with pytest.raises(ValueError, match="expected a pattern that matches"):
        dynaprune.prepare(mlp(), settings(exclude=["nothing"]))

    class Factored(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["row"] = p.detach().sum(1)

    model = mlp()
    with pytest.raises(
        ValueError, match=r"its state 'row' has shapes \[\(3,\)\] for a weight of shape \(3, 2\)"
    ):
        dynaprune.attach(model, Factored(model.parameters(), 0.1), settings())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"units": "heads"}, "expected units to be one of blocks, neurons, both, got 'heads'"),
        ({"score": "magnitude"}, "expected a score that is made of gates .second_moment, taylor, movement."),
        ({"neurons": False}, "expected neurons=True with units='neurons', got False"),
        ({"regrow": 0.1}, "expected regrow=0 with units='neurons', got 0.1"),
        ({"initial_sparsity": 0.2}, "expected initial_sparsity=0 with units='neurons', got 0.2"),
        (
            {"units": "both", "initial_sparsity": 0.5},
            r"expected a target_sparsity above the initial_sparsity \(0.5\) with units='both'",
        ),
        ({"allocation": "erk"}, "expected allocation 'global' or 'uniform' with units='neurons', got 'erk'"),
    ],
)
def test_settings_without_use_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**changes)


@pytest.mark.parametrize("units", ["blocks", "neurons"])
def test_an_optimizer_that_was_not_given_goes_on_with_its_biases(units: str) -> None:
    """The twin's pruner is given both."""
    trained = []
    for given in (1, 2):
        model = mlp()
        weights = torch.optim.Adam([p for p in model.parameters() if p.dim() > 1], lr=1e-2)
        biases = torch.optim.Adam([p for p in model.parameters() if p.dim() == 1], lr=1e-2)
        config = settings(units=units, block_size=8, target_sparsity=0.7)
        dynaprune.attach(model, [weights, biases][:given], config, example_inputs=batch(0)[0])
        for step in range(STEPS):
            for each in (weights, biases):
                each.zero_grad()
            loss_of(model, step).backward()
            for each in (weights, biases):
                each.step()
        assert model[0].bias.shape[0] < 64
        assert biases.state[model[0].bias]["exp_avg"].shape == model[0].bias.shape
        trained.append(model)
    assert widths(trained[0]) == widths(trained[1])


def test_hooks_and_schedulers_go_on() -> None:
    model = mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
    seen: list[torch.Size] = []
    model[2].weight.register_hook(lambda grad: seen.append(grad.shape))
    dynaprune.attach(model, optimizer, settings(), example_inputs=batch(0)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, STEPS, after=scheduler.step)
    assert len(seen) == STEPS and seen[-1] == model[2].weight.shape and seen[-1] != seen[0]


def test_muon_trains_the_matrices_beside_another_optimizer() -> None:
    model = mlp()
    matrices = [model[0].weight, model[2].weight]
    muon = torch.optim.Muon(matrices, lr=1e-2)  # type: ignore[arg-type]
    rest = [p for p in model.parameters() if not any(p is each for each in matrices)]
    optimizers = [muon, torch.optim.Adam(rest, lr=1e-2)]
    pruner = dynaprune.attach(model, optimizers, settings(), example_inputs=batch(0)[0])
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert pruner.target_reached
    assert muon.state[model[2].weight]["momentum_buffer"].shape == widths(model)[1]


def test_a_compiled_model_is_compiled_anew_for_its_widths() -> None:
    model = mlp()
    optimizer = adam(model)
    compiled: Any = torch.compile(model, backend="eager")
    config = settings(interval=7)
    pruner = dynaprune.attach(compiled, optimizer, config, example_inputs=batch(0)[0])
    train(compiled, optimizer, STEPS)
    assert pruner.target_reached and widths(model)[0][0] < 64
    torch.testing.assert_close(compiled(batch(3)[0]), model(batch(3)[0]))
