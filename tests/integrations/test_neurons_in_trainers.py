"""``units="neurons"`` in the Trainer and in Lightning: the callbacks as they are, plain layers all along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynaprune import DynaPruneCallback, DynaPruneLightningCallback
from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.manifest import structure_manifest
from tests.integrations import test_lightning, trainer_cases
from tests.rounding import agree

STEPS = 20


def bert_of_four_heads() -> Any:
    return trainer_cases.bert(num_attention_heads=4, num_hidden_layers=2)


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
