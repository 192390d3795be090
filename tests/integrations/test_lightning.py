"""Lightning with one more callback: closures, checkpoints, the best score, early stopping."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dynaprune
from dynaprune import DynaPruneLightningCallback, PruningConfig
from dynaprune.saving.manifest import structure_manifest
from tests.integrations.scripts import run_example
from tests.pruning.attached import STEPS, assert_equal, batch, dense_weights, loss_of, mlp, sparse_layers
from tests.pruning.attached import settings as plain_settings

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

BATCHES = 8


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """The small classifier of the tests of ``attach``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, parts: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(parts[0]), parts[1])

    def validation_step(self, parts: list[Tensor], _: int) -> None:
        self.log("age", float(self.global_step))

    def test_step(self, parts: list[Tensor], _: int) -> None:
        self.log("loss", self.training_step(parts, 0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader() -> Any:
    """The batches of the plain loop in order, ``BATCHES`` of 16 rows per epoch."""
    parts = [batch(step) for step in range(BATCHES)]
    rows = TensorDataset(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    return DataLoader(rows, batch_size=16)


def losses(module: nn.Module, parts: Any) -> tuple[Tensor, Tensor]:
    x, y = parts
    return nn.functional.cross_entropy(module(x), y, reduction="none"), y


def settings(**changes: Any) -> PruningConfig:
    return plain_settings(**{"total_steps": None, "neurons": True, **changes})


def trainer(out: Path, *added: Any, **options: Any) -> Any:
    chosen = {
        "max_epochs": STEPS // BATCHES,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, callbacks.ModelCheckpoint) for each in added),
        "default_root_dir": str(out),
    }
    return lightning.Trainer(callbacks=list(added), **{**chosen, **options})


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_the_same_as_the_plain_loop(tmp_path: Path) -> None:
    """Lightning steps with a closure; weights are those of the plainest loop, bit for bit."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    dynaprune.attach(model, optimizer, settings(total_steps=STEPS, batch_size=16))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step % BATCHES).backward()
        optimizer.step()
    module, pruning = Module(), DynaPruneLightningCallback(settings())
    run = trainer(tmp_path, pruning)
    run.fit(module, loader())
    assert pruning.pruner is not None
    report = pruning.pruner.report()
    assert (
        report["steps"] == report["config"]["total_steps"] == STEPS and report["config"]["batch_size"] == 16
    )
    assert report["target_reached"] and report["removed_untested"] > 0 and not report["trials"]["tested"]
    assert report["layers"]["net.4"]["exempt"].startswith("the classifier")
    assert_equal(dense_weights(module), dense_weights(model))
    assert float(run.logged_metrics["sparsity"]) == pytest.approx(pruning.pruner.sparsity)
    assert {"density", "sparsity_of_model", "live_parameters", "flops_saving"} <= set(run.logged_metrics)


def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(ckpt: str | None = None) -> tuple[Any, DynaPruneLightningCallback]:
        module, pruning = Module(), DynaPruneLightningCallback(settings(), loss=losses)
        saving = callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
        trainer(tmp_path, pruning, *([saving] if ckpt is None else [])).fit(module, loader(), ckpt_path=ckpt)
        return module, pruning

    whole, pruned = run()
    resumed, again = run(str(tmp_path / "step=8.ckpt"))
    assert pruned.pruner is not None and again.pruner is not None
    left, right = pruned.pruner.report(), again.pruner.report()
    assert left["trials"]["tested"] and left["compactions"] > 0 and left["neurons_removed"] > 0
    assert 0 < left["history"][1]["step"] <= 8 < left["history"][-1]["step"]
    assert structure_manifest(resumed) == structure_manifest(whole)
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    keys = ("history", "removed_passed", "removed_forced", "neurons_removed", "steps", "trials")
    for each in (left, right):
        each["trials"] = each["trials"]["count"], each["trials"]["smallest_sample"]
    assert all(left[key] == right[key] for key in keys)
    fresh = Module()
    tested = trainer(tmp_path, DynaPruneLightningCallback(settings()))
    loss = tested.test(fresh, loader(), ckpt_path=str(tmp_path / "step=24.ckpt"), verbose=False)
    assert structure_manifest(fresh) == structure_manifest(whole)
    assert loss == trainer(tmp_path).test(whole, loader(), verbose=False)


def test_the_best_checkpoint_and_patience_wait_for_the_structure(tmp_path: Path) -> None:
    """The metric grows with every step: the first eligible epoch is the best."""
    module, pruning = Module(), DynaPruneLightningCallback(settings(total_steps=6 * BATCHES, interval=6))
    stopping = callbacks.EarlyStopping("age", patience=2)
    saving = callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", monitor="age", save_top_k=1)
    run = trainer(tmp_path, stopping, pruning, saving, max_epochs=12)
    run.fit(module, loader(), loader())
    assert pruning.pruner is not None
    reached = next(row["step"] for row in pruning.pruner.history if row["sparsity"] >= 0.75 - 1e-9)
    eligible = -(-reached // BATCHES) * BATCHES
    assert eligible > BATCHES
    assert Path(saving.best_model_path).name == f"step={eligible}.ckpt"
    assert run.global_step == eligible + 2 * BATCHES
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={eligible}.ckpt"]


def test_several_fits_and_what_is_refused(tmp_path: Path) -> None:
    module, pruning = Module(), DynaPruneLightningCallback(settings(target_sparsity=0.3))
    trainer(tmp_path, pruning).fit(module, loader())
    first = pruning.pruner
    trainer(tmp_path, pruning).fit(module, loader())
    assert first is not None and pruning.pruner is not first and sparse_layers(module)
    with pytest.raises(ValueError, match="at least one prunable layer, got none"):
        trainer(tmp_path, DynaPruneLightningCallback(PruningConfig(block_size=128))).fit(Module(), loader())
    endless = trainer(tmp_path, DynaPruneLightningCallback(settings()), max_epochs=-1)
    with pytest.raises(ValueError, match="expected a training of known length"):
        endless.fit(Module(), loader())
    with pytest.raises(TypeError, match="expected a PruningConfig, got dict"):
        DynaPruneLightningCallback({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a loss or a trial, got both"):
        DynaPruneLightningCallback(settings(), loss=losses, trial=lambda: torch.zeros(64))
    with pytest.raises(ValueError, match="a loss beside calibration"):
        DynaPruneLightningCallback(settings(), calibration=loader().dataset)


def test_a_checkpoint_without_a_pruner_cannot_be_resumed(tmp_path: Path) -> None:
    saving = callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
    trainer(tmp_path, saving).fit(Module(), loader())
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.0\.values"):
        trainer(tmp_path, DynaPruneLightningCallback(settings())).fit(
            Module(), loader(), ckpt_path=str(tmp_path / "step=8.ckpt")
        )


def test_the_documented_script(tmp_path: Path) -> None:
    names = {"module": Module(), "train_loader": loader(), "output_dir": str(tmp_path)}
    done = run_example(DynaPruneLightningCallback.__doc__, names)
    assert done["pruning"].pruner.target_reached
    assert not sparse_layers(done["smaller"])
