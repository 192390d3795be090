"""``units="neurons"`` in the Trainer and in Lightning: the callbacks as they are, plain layers all along."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune import DynaPruneCallback, DynaPruneLightningCallback
from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.manifest import structure_manifest
from tests.integrations import test_lightning, test_lightning_averages, trainer_cases
from tests.rounding import agree

STEPS = 20


def bert_of_four_heads() -> Any:
    return trainer_cases.bert(num_attention_heads=4, num_hidden_layers=2)


class Average(trainer_cases.transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Averages after each step what has to be as wide as the model by then."""

    def __init__(self, pruning: DynaPruneCallback, kind: str) -> None:
        self.pruning, self.kind, self.steps = pruning, kind, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.kind == "module":
            self.average: Any = copy.deepcopy(model)
        elif self.kind == "parameters":
            self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        else:
            self.average = {name: value.clone() for name, value in model.state_dict().items()}
        assert self.pruning.pruner is not None
        self.pruning.pruner.follow(self.average)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        mine = self.tensors(model)
        for name, parameter in model.named_parameters():
            mine[name].lerp_(parameter, 0.2)
        self.steps += 1

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        held = dict(self.average.named_parameters()) if self.kind == "module" else self.average
        return {name: held[name] for name, _ in model.named_parameters()}


def settings() -> Any:
    return trainer_cases.settings(units="neurons", target_sparsity=0.5, exclude=["bert.pooler"], interval=2)


def test_the_trainer_cuts_heads_and_feed_forward_neurons(tmp_path: Path) -> None:
    pruning = DynaPruneCallback(bert_of_four_heads(), settings(), samples=128)
    run = trainer_cases.trainer(tmp_path, pruning, max_steps=STEPS, save_steps=5)
    run.train()
    model, pruner = run.model, pruning.pruner
    assert pruner is not None
    report = pruner.report()
    assert report["target_reached"] and report["trials"]["count"] > 0 and report["removed_passed"] > 0
    assert not any(isinstance(module, BlockSparseLayer) for module in model.modules())
    heads = [layer.attention.self for layer in model.bert.encoder.layer]
    assert sum(each.num_attention_heads for each in heads) < 8
    for each in heads:
        width = each.num_attention_heads * 8
        assert width == each.all_head_size == each.value.out_features == each.query.out_features >= 8
    folder = tmp_path / f"checkpoint-{STEPS}"
    loaded = trainer_cases.loaded_model(folder)
    assert structure_manifest(loaded) == structure_manifest(model)
    assert agree(trainer_cases.logits(loaded), trainer_cases.logits(model))
    again = DynaPruneCallback(bert_of_four_heads(), settings(), samples=128)
    resumed = trainer_cases.trainer(tmp_path / "out", again, max_steps=STEPS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    mine, theirs = resumed.model.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert 0 < pruner.history[1]["step"] <= 5 < pruner.history[-1]["step"]


def test_lightning_cuts_neurons_and_resumes(tmp_path: Path) -> None:
    changes = {"units": "neurons", "target_sparsity": 0.5}

    def run(ckpt: str | None = None) -> tuple[Any, DynaPruneLightningCallback]:
        module = test_lightning.Module()
        pruning = DynaPruneLightningCallback(test_lightning.settings(**changes), loss=test_lightning.losses)
        saving = test_lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
        added = [saving] if ckpt is None else []
        test_lightning.trainer(tmp_path, pruning, *added).fit(module, test_lightning.loader(), ckpt_path=ckpt)
        return module, pruning

    with pytest.warns():
        whole, pruned = run()
    resumed, again = run(str(tmp_path / "step=8.ckpt"))
    assert pruned.pruner is not None and again.pruner is not None
    assert pruned.pruner.target_reached and pruned.pruner.history[1]["step"] <= 8
    assert again.pruner.history == pruned.pruner.history and len(again.pruner.history) > 3
    mine, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert whole.net[0].out_features < 64 and type(whole.net[0]) is torch.nn.Linear


@pytest.mark.parametrize("first", ["pruning", "averaging"])
def test_an_average_of_lightnings_gets_narrower_too_and_resumes(first: str, tmp_path: Path) -> None:
    """The network has a batch norm, whose averaged statistics are cut along."""

    def run(out: Path, epochs: int, resume: Path | None = None) -> tuple[Any, Any, Any]:
        settings = test_lightning.settings(units="neurons", target_sparsity=0.5, total_steps=24)
        pruning = DynaPruneLightningCallback(settings, loss=test_lightning.losses)
        averaging = test_lightning.callbacks.EMAWeightAveraging(decay=0.8)
        pair = [pruning, averaging] if first == "pruning" else [averaging, pruning]
        saving = test_lightning.callbacks.ModelCheckpoint(dirpath=out, filename="last", save_top_k=1)
        module = test_lightning_averages.Module()
        trainer = test_lightning.trainer(out, *pair, saving, max_epochs=epochs)
        trainer.fit(module, test_lightning.loader(), ckpt_path=resume)
        return module, pruning.pruner, averaging._average_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, _, average = run(tmp_path / "whole", 3)
        run(tmp_path / "half", 2)
        resumed, pruner, _ = run(tmp_path / "rest", 3, tmp_path / "half" / "last.ckpt")
    assert structure_manifest(average.module) == structure_manifest(whole)
    assert pruner.target_reached and whole.net[0].out_features == whole.net[1].num_features < 64
    x = test_lightning.batch(3)[0]
    torch.testing.assert_close(resumed.eval()(x), whole.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["module", "parameters", "floats of the state dict"])
def test_an_average_beside_the_trainer_follows(kind: str, tmp_path: Path) -> None:
    pruning = DynaPruneCallback(bert_of_four_heads(), settings(), samples=64)
    average = Average(pruning, kind)
    trainer_cases.trainer(
        tmp_path, pruning, callbacks=(average,), max_steps=STEPS, save_strategy="no", eval_strategy="no"
    ).train()
    assert pruning.pruner is not None and pruning.pruner.target_reached and average.steps == STEPS
    for name, tensor in average.tensors(pruning.model).items():
        assert tensor.shape == dict(pruning.model.named_parameters())[name].shape
