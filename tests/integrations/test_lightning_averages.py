"""Lightning's averages of weights beside our callback: they follow by themselves, wherever they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune import DynaPruneLightningCallback
from tests.integrations import test_lightning as cases
from tests.pruning.attached import STEPS, batch, mlp, sparse_layers
from tests.pruning.edit.test_averaging_recipes import assert_close, dense, live, reference

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
DECAY = 0.8

quiet = cases.quiet


class Module(cases.Module):
    """With a batch norm, a validation loss, and a network of three layers."""

    def __init__(self) -> None:
        super().__init__()
        plain = mlp()
        self.net = nn.Sequential(plain[0], nn.BatchNorm1d(64), *plain[1:])

    def validation_step(self, parts: list[Tensor], _: int) -> None:
        self.log("loss", self.training_step(parts, 0))


class DenseReference(lightning.Callback):  # type: ignore[misc, name-defined]
    """Averages densely what the optimizer made, and compares after each batch."""

    def __init__(self, averaging: Any) -> None:
        self.averaging, self.compared = averaging, 0
        self.expected: dict[str, Tensor] = {}
        self.was: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now, alive = dense(dict(pl_module.named_parameters()), pl_module), live(pl_module)
        if self.expected:
            kept = {n: t * (self.was[n] & alive[n]) for n, t in self.expected.items()}
            self.expected = reference(kept, now, DECAY)
        else:
            self.expected = now
        self.was = alive
        average = self.averaging._average_model.module
        assert_close(dense(dict(average.named_parameters()), pl_module), self.expected)
        self.compared += 1


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("first", ["pruning", "averaging"])
@pytest.mark.parametrize("neurons", [False, True])
def test_the_exponential_average_is_the_dense_one(
    tmp_path: Path, first: str, buffers: bool, neurons: bool
) -> None:
    pruning = DynaPruneLightningCallback(cases.settings(neurons=neurons), loss=cases.losses)
    averaging = callbacks.EMAWeightAveraging(decay=DECAY, use_buffers=buffers)
    pair = [pruning, averaging] if first == "pruning" else [averaging, pruning]
    checks = [] if neurons else [DenseReference(averaging)]
    module = Module()
    cases.trainer(tmp_path, *pair, *checks).fit(module, cases.loader(), cases.loader())
    assert pruning.pruner is not None and pruning.pruner.target_reached
    assert (pruning.pruner.report()["neurons_removed"] > 0) == neurons
    for check in checks:
        assert check.compared == STEPS
        assert_close(dense(dict(module.named_parameters()), module), check.expected)
    average = averaging._average_model.module
    for mine, theirs in zip(sparse_layers(module), sparse_layers(average), strict=True):
        assert torch.equal(mine.layout.slot_of_block, theirs.layout.slot_of_block)
    torch.testing.assert_close(module.eval()(batch(3)[0]), average.eval()(batch(3)[0]))


@pytest.mark.parametrize("first", ["pruning", "averaging"])
def test_stochastic_weight_averaging(tmp_path: Path, first: str) -> None:
    """The mean of the weights at the beginnings of epochs, from the second one on."""
    seen: list[dict[str, Tensor]] = []
    alive: list[dict[str, Tensor]] = []

    class Watch(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch < 3:
                seen.append(dense(dict(pl_module.named_parameters()), pl_module))
                alive.append(live(pl_module))

    pruning = DynaPruneLightningCallback(cases.settings(neurons=False), loss=cases.losses)
    averaging = callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)
    pair = [pruning, averaging] if first == "pruning" else [averaging, pruning]
    module = Module()
    cases.trainer(tmp_path, *pair, Watch()).fit(module, cases.loader())
    assert pruning.pruner is not None and pruning.pruner.target_reached
    last, average = live(module), averaging._average_model
    assert len(seen) == 3
    mean = {n: (seen[1][n] * last[n] + seen[2][n] * last[n]) / 2 for n in seen[1]}
    assert_close(dense(dict(average.named_parameters()), module), mean)
    for mine, theirs in zip(sparse_layers(module), sparse_layers(average), strict=True):
        assert torch.equal(mine.layout.slot_of_block, theirs.layout.slot_of_block)


@pytest.mark.parametrize("first", ["pruning", "averaging"])
@pytest.mark.parametrize("neurons", [False, True])
def test_a_run_with_an_average_resumes(tmp_path: Path, first: str, neurons: bool) -> None:
    def run(out: Path, epochs: int, resume: Path | None = None) -> tuple[Any, Any]:
        pruning = DynaPruneLightningCallback(
            cases.settings(neurons=neurons, total_steps=STEPS), loss=cases.losses
        )
        averaging = callbacks.EMAWeightAveraging(decay=DECAY)
        pair = [pruning, averaging] if first == "pruning" else [averaging, pruning]
        saving = callbacks.ModelCheckpoint(dirpath=out, filename="last", save_top_k=1)
        module = Module()
        trainer = cases.trainer(out, *pair, saving, max_epochs=epochs)
        trainer.fit(module, cases.loader(), ckpt_path=resume)
        return module, pruning.pruner

    whole, _ = run(tmp_path / "whole", 3)
    _, half = run(tmp_path / "half", 2)
    assert (half.report()["neurons_removed"] > 0) == neurons
    resumed, pruner = run(tmp_path / "rest", 3, tmp_path / "half" / "last.ckpt")
    assert pruner.steps == STEPS and pruner.target_reached
    x = batch(3)[0]
    torch.testing.assert_close(resumed.eval()(x), whole.eval()(x), rtol=1e-5, atol=1e-6)
