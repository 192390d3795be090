"""``transformers.Trainer`` with one more callback: logs, checkpoints, resuming, wrong arguments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import dynaprune
from dynaprune import DynaPruneCallback, PruningConfig
from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.manifest import structure_manifest
from tests.integrations.scripts import run_example
from tests.integrations.trainer_cases import (
    STEPS,
    TRAIN,
    Rows,
    arguments,
    bert,
    loaded_model,
    logits,
    masks,
    settings,
    trainer,
    transformers,
)
from tests.rounding import agree


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training that was never interrupted, with its callback and the folder of its checkpoints."""
    out = tmp_path_factory.mktemp("whole")
    pruning = DynaPruneCallback(bert(), settings())
    run = trainer(out, pruning)
    run.train()
    return run, pruning, out


def test_the_run_prunes_by_trial_and_learns(whole: Any) -> None:
    run, pruning, _ = whole
    report = pruning.pruner.report()
    assert report["target_reached"] and report["config"]["total_steps"] == STEPS
    assert report["config"]["batch_size"] == 16 and report["steps"] == STEPS
    assert report["trials"]["tested"] and report["removed_passed"] > 0 and report["removed_untested"] == 0
    assert report["trials"]["smallest_sample"] == 512 and report["compactions"] > 0
    assert report["layers"]["classifier"]["exempt"].startswith("the classifier")
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert type(run.optimizer).__name__ == "AcceleratedOptimizer"


def test_logs_tell_how_far_it_is(whole: Any) -> None:
    run, pruning, _ = whole
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    sparsities = [row["sparsity"] for row in rows]
    assert 0 < sparsities[0] < sparsities[1] <= sparsities[-1] == pruning.pruner.sparsity
    for row in rows:
        assert row["density"] == 1 - row["sparsity"] and 0 < row["flops_saving"] < 1
    live = sum(int((layer.weight != 0).sum()) for layer in pruning.pruner.layers.values())
    values = {id(layer.values) for layer in pruning.pruner.layers.values()}
    rest = sum(p.numel() for p in run.model.parameters() if id(p) not in values)
    assert rows[-1]["live_parameters"] == live + rest
    assert rows[-1]["sparsity_of_model"] == pruning.pruner.sparsity_of_model < rows[-1]["sparsity"]


@pytest.mark.parametrize("step", [10, 20])
def test_a_resumed_run_ends_like_the_uninterrupted_one(whole: Any, step: int, tmp_path: Path) -> None:
    """From a checkpoint between two events, and from one after cuts; in a folder elsewhere."""
    run, pruning, out = whole
    copied = tmp_path / "moved" / f"checkpoint-{step}"
    shutil.copytree(out / f"checkpoint-{step}", copied)
    again = DynaPruneCallback(bert(), settings())
    resumed = trainer(tmp_path / "out", again, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(copied))
    assert structure_manifest(resumed.model) == structure_manifest(run.model)
    mine, theirs = resumed.model.state_dict(), run.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert masks(resumed.model) and all(map(torch.equal, masks(resumed.model), masks(run.model)))
    left, right = again.pruner.report(), pruning.pruner.report()
    keys = ("history", "removed_passed", "removed_forced", "neurons_removed", "compactions", "steps")
    assert all(left[key] == right[key] for key in keys)
    losses = [[row for row in each.state.log_history if "loss" in row] for each in (resumed, run)]
    assert losses[0][-1] == losses[1][-1]


def test_the_checkpoints_differ_in_structure(whole: Any) -> None:
    _, pruning, out = whole
    found = [structure_manifest(loaded_model(out / f"checkpoint-{step}")) for step in (10, 20)]
    assert found[0] != found[1] == structure_manifest(pruning.model)
    assert pruning.pruner.report()["neurons_removed"] > 0


def test_from_pretrained_gives_the_pruned_model(whole: Any, tmp_path: Path) -> None:
    run, _, out = whole
    expected = logits(run.model)
    model = loaded_model(out / f"checkpoint-{STEPS}")
    assert agree(logits(model), expected)
    assert all(map(torch.equal, masks(model), masks(run.model)))
    model.save_pretrained(tmp_path / "again")
    assert agree(logits(loaded_model(tmp_path / "again")), expected)
    pruning = DynaPruneCallback(model, settings(target_sparsity=0.3))
    trainer(tmp_path / "further", pruning, max_steps=10).train()
    assert pruning.pruner.steps == 10 and pruning.pruner.target_reached
    assert agree(logits(loaded_model(tmp_path / "further" / "checkpoint-10")), logits(model))


def test_from_pretrained_without_dynaprune_stops(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where our form is not registered: better an error than random layers."""
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "dynaprune")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded_model(whole[2] / f"checkpoint-{STEPS}")


def test_plain_layers_need_no_mention_where_nothing_was_cut(tmp_path: Path) -> None:
    pruning = DynaPruneCallback(bert(), settings(neurons=False))
    trainer(tmp_path, pruning, save_strategy="no").train()
    model = pruning.pruner.finalize()
    model.save_pretrained(tmp_path)
    assert '"quantization_config": null' in (tmp_path / "config.json").read_text()
    loaded = loaded_model(tmp_path)
    assert not any(isinstance(module, BlockSparseLayer) for module in loaded.modules())
    assert agree(logits(loaded), logits(model))


def test_plain_layers_of_other_widths_load_too(tmp_path: Path) -> None:
    """Of a model of which neurons were cut."""
    pruning = DynaPruneCallback(bert(), settings(target_sparsity=0.8), trial=False)
    trainer(tmp_path, pruning, save_strategy="no").train()
    assert pruning.pruner.report()["neurons_removed"] > 0
    model = pruning.pruner.finalize()
    model.save_pretrained(tmp_path)
    loaded = loaded_model(tmp_path)
    assert not any(isinstance(module, BlockSparseLayer) for module in loaded.modules())
    assert structure_manifest(loaded) == structure_manifest(model)
    assert agree(logits(loaded), logits(model))


def test_a_checkpoint_without_a_pruner_cannot_be_resumed(whole: Any, tmp_path: Path) -> None:
    _, _, out = whole
    transformers.Trainer(
        bert(), arguments(tmp_path, max_steps=10, eval_strategy="no"), train_dataset=TRAIN
    ).train()
    run = trainer(tmp_path, DynaPruneCallback(bert(), settings()))
    with pytest.raises(ValueError, match="with block-sparse layers, got one with a dense"):
        run.train(resume_from_checkpoint=True)
    folder = tmp_path / "stripped"
    shutil.copytree(out / "checkpoint-20", folder)
    loaded_model(folder).save_pretrained(folder)
    run = trainer(tmp_path, DynaPruneCallback(loaded_model(folder), settings()))
    with pytest.raises(ValueError, match="without a pruner's state"):
        run.train(resume_from_checkpoint=str(folder))


def test_a_model_with_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match=r"at least one prunable layer, got none: .*would store"):
        DynaPruneCallback(bert(), PruningConfig(block_size=128))
    model = bert()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"at least one prunable layer, got none: .*frozen"):
        DynaPruneCallback(model, settings())


def test_a_trainer_of_another_model(tmp_path: Path) -> None:
    pruning = DynaPruneCallback(bert(), settings())
    with pytest.raises(ValueError, match="that this callback was made with, got another"):
        transformers.Trainer(bert(), arguments(tmp_path), eval_dataset=TRAIN, callbacks=[pruning])
    with pytest.raises(ValueError, match="no model_init"):
        transformers.Trainer(
            model_init=lambda: bert(), args=arguments(tmp_path, eval_strategy="no"), callbacks=[pruning]
        )


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Any:
        return iter([TRAIN[i] for i in range(512)])


def test_wrong_arguments(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(TypeError, match="expected a PruningConfig, got dict"):
        DynaPruneCallback(model, {"target_sparsity": 0.5})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="as True, False or a callable"):
        DynaPruneCallback(model, settings(), trial=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with trial=True only"):
        DynaPruneCallback(model, settings(), trial=False, calibration=TRAIN)
    with pytest.raises(ValueError, match="at least 1 epoch"):
        DynaPruneCallback(model, settings(), patience=0)
    with pytest.raises(TypeError, match=r"an nn\.Module, got str"):
        DynaPruneCallback("bert", settings())  # type: ignore[arg-type]
    run = trainer(tmp_path, DynaPruneCallback(model, settings()))
    run.train_dataset = Stream()
    with pytest.raises(TypeError, match=r"map-style data set .* trial=False"):
        run.train()


class Scorer(nn.Module):
    """A model that transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.hidden, self.out = nn.Linear(32, 64), nn.Linear(64, 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        scores = self.out(torch.relu(self.hidden(self.embed(input_ids).mean(1))))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def test_another_kind_of_model_brings_its_losses(tmp_path: Path) -> None:
    def losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        scores = model(**batch)["logits"]
        return nn.functional.cross_entropy(scores, batch["labels"], reduction="none"), batch["labels"]

    with pytest.raises(ValueError, match=r"got Scorer with None and labels: give loss=f"):
        trainer(tmp_path, DynaPruneCallback(Scorer(), settings())).train()
    held_out = Rows(256, 2)
    pruning = DynaPruneCallback(Scorer(), settings(), loss=losses, calibration=held_out, samples=200)
    whole = trainer(tmp_path / "whole", pruning)
    whole.train()
    assert pruning.pruner.report()["trials"]["smallest_sample"] == 200 and pruning.pruner.target_reached
    again = DynaPruneCallback(Scorer(), settings(), loss=losses, calibration=held_out, samples=200)
    folder = tmp_path / "whole" / "checkpoint-20"
    trainer(tmp_path / "resumed", again).train(resume_from_checkpoint=str(folder))
    parameters = zip(again.model.parameters(), pruning.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


def test_the_documented_script(tmp_path: Path) -> None:
    start, out = str(tmp_path / "start"), str(tmp_path / "out")
    bert(hidden_size=64, intermediate_size=128).save_pretrained(start)
    names = {"model_name": start, "output_dir": out, "train_dataset": Rows(256, 0)}
    done = run_example(dynaprune.DynaPruneCallback.__doc__, names)
    assert done["pruning"].pruner.target_reached
    assert agree(logits(done["smaller"].cpu()), logits(done["model"].cpu()))
