"""A training that begins sparse, in the Trainer and in Lightning: the rate of its blocks, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynaprune
from dynaprune import DynaPruneCallback, DynaPruneLightningCallback
from tests.integrations import trainer_cases as hf
from tests.integrations.test_lightning import BATCHES, Module, loader, trainer
from tests.pruning.attached import assert_equal, dense_weights, loss_of
from tests.pruning.test_sparse_rates import Seen

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
STEPS = 12


class Watch(hf.transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Notes the rates of every step."""

    seen: Seen

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.seen = Seen(optimizer.optimizer)


def run(out: Path, **changes: Any) -> tuple[Any, DynaPruneCallback, Watch]:
    config = hf.settings(initial_sparsity=0.5, target_sparsity=0.7, interval=2)
    pruning, watch = DynaPruneCallback(hf.bert(), config, trial=False), Watch()
    chosen = {
        "max_steps": STEPS,
        "save_steps": 6,
        "eval_strategy": "no",
        "warmup_steps": 3,
        "weight_decay": 0.1,
    }
    made = hf.transformers.Trainer(
        pruning.model,
        hf.arguments(out, **{**chosen, **changes}),
        train_dataset=hf.TRAIN,
        callbacks=[watch, pruning],
    )
    return made, pruning, watch


def ratios(model: nn.Module, seen: Seen) -> set[float]:
    """Rate of the block values over that of the biases, at each step of which that is above 0."""
    fast = {id(layer.values) for layer in model.modules() if isinstance(layer, dynaprune.BlockSparseLinear)}
    found = set()
    for step in seen.steps:
        mine = {rate for key, (rate, _) in step.items() if key in fast}
        rest = {rate for key, (rate, _) in step.items() if key not in fast}
        assert len(mine) == len(rest) == 1
        found |= {round(m / r, 9) for m, r in zip(mine, rest, strict=True) if r}
    return found


def test_the_trainers_optimizer_sees_the_rates_and_resumes(tmp_path: Path) -> None:
    whole, pruning, watch = run(tmp_path / "whole")
    whole.train()
    assert len(watch.seen.steps) == STEPS and ratios(whole.model, watch.seen) == {2.0}
    assert pruning.pruner is not None
    report = pruning.pruner.report()
    assert report["target_reached"] and report["blocks_never_present"] > report["blocks_removed"] > 0
    assert set(report["learning_rate_multipliers"].values()) == {2.0}
    assert len(whole.optimizer.param_groups) == 2  # with and without decay, as the Trainer makes them
    again, pruning, watch = run(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert len(watch.seen.steps) == STEPS - 6 and ratios(again.model, watch.seen) == {2.0}
    mine, theirs = again.model.state_dict(), whole.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert pruning.pruner is not None
    assert pruning.pruner.report()["blocks_never_present"] == report["blocks_never_present"]


def test_the_trainer_takes_a_trained_model_that_prepare_has_begun_sparse(tmp_path: Path) -> None:
    hf.bert().save_pretrained(tmp_path / "whole")
    model = hf.loaded_model(tmp_path / "whole")
    old = {name: module.weight.detach().clone() for name, module in _linears(model)}
    with pytest.raises(ValueError, match=r"config.name_or_path is .*Give dynaprune.prepare a calibration"):
        DynaPruneCallback(model, hf.settings(initial_sparsity=0.5))

    def losses(model: nn.Module) -> Any:
        for row in range(0, 32, 4):
            parts = hf.TRAIN.tokens[row : row + 4], hf.TRAIN.labels[row : row + 4]
            yield model(input_ids=parts[0], labels=parts[1]).loss

    config = hf.settings(initial_sparsity=0.5, target_sparsity=0.6, interval=2, regrow=0.8)
    prepared = dynaprune.prepare(model, config, calibration=losses)
    assert prepared.pretrained is not None, "read from the folder that the model was loaded from"
    for name, layer in _linears(model):
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], old[name][kept])
    pruning = DynaPruneCallback(prepared, trial=False)
    hf.transformers.Trainer(
        model,
        hf.arguments(tmp_path / "out", max_steps=STEPS, eval_strategy="no"),
        train_dataset=hf.TRAIN,
        callbacks=[pruning],
    ).train()
    assert pruning.pruner is not None
    report = pruning.pruner.report()
    assert report["target_reached"] and report["blocks_regrown"] > 0 and report["blocks_never_present"] > 0
    with pytest.raises(ValueError, match="expected config and example_inputs in prepare"):
        DynaPruneCallback(prepared, config)


def _linears(model: nn.Module) -> list[tuple[str, Any]]:
    kinds = (nn.Linear, dynaprune.BlockSparseLinear)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]


def test_lightning_takes_what_prepare_made(tmp_path: Path) -> None:
    config = dynaprune.PruningConfig(initial_sparsity=0.75, target_sparsity=0.75, block_size=8)
    module = Module()
    pruning = DynaPruneLightningCallback(dynaprune.prepare(module, config))
    trainer(tmp_path, pruning, max_epochs=1).fit(module, loader())
    assert pruning.pruner is not None and pruning.pruner.steps == BATCHES
    assert pruning.pruner.report()["blocks_never_present"] == 72
    with pytest.raises(ValueError, match="expected a Trainer of the Module that this callback was made with"):
        trainer(tmp_path, pruning, max_epochs=1).fit(Module(), loader())


class Scheduled(Module):
    """With a schedule that gives all groups one number."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=2 * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_lightning_is_the_plain_loop(tmp_path: Path) -> None:
    config = dynaprune.PruningConfig(initial_sparsity=0.75, target_sparsity=0.75, block_size=8)
    model = Module()
    prepared = dynaprune.prepare(model, config)
    optimizer = torch.optim.AdamW(prepared.parameter_groups(lr=1e-2, weight_decay=0.1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.08], total_steps=2 * BATCHES)
    dynaprune.attach(prepared, optimizer)
    for step in range(2 * BATCHES):
        optimizer.zero_grad()
        loss_of(model, step % BATCHES).backward()
        optimizer.step()
        schedule.step()
    module, pruning = Scheduled(), DynaPruneLightningCallback(config)
    trainer(tmp_path, pruning, max_epochs=2).fit(module, loader())
    assert pruning.pruner is not None and pruning.pruner.report()["blocks_never_present"] == 72
    assert len(pruning.pruner.optimizers[0].param_groups) == 1
    for mine, expected in zip(dense_weights(module), dense_weights(model), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)  # 16 steps of rates that round
    assert_equal([mine == 0 for mine in dense_weights(module)], [each == 0 for each in dense_weights(model)])
