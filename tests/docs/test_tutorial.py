"""The documentation: the tutorial's blocks run, and commands have the options that are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.main import get_command

import dynaprune
from dynaprune.cli import app
from dynaprune.experiment.tasks import task_names
from dynaprune.nn import BlockSparseLayer

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"(<!-- needs downloads -->\n)?```python\n(.*?)```", re.DOTALL)
# What makes the tutorial's run short: text as it stands there, and what the test puts in its place.
_SHORTER = {
    "epochs = 15": "epochs = 2",
    "test_size=0.2": "test_size=0.9",
    "trial_budget=0.2": "trial_budget=None",
}


def blocks(section: str) -> list[tuple[bool, str]]:
    """The Python blocks under a heading of the tutorial: whether each needs downloads, and its code."""
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [(bool(flag), code) for flag, code in _BLOCK.findall(body)]


def test_every_block_stands_in_a_section_that_is_run() -> None:
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    sections = ("A ResNet in a plain loop", "A transformers Trainer", "Lightning and accelerate")
    run = sum(len(blocks(section)) for section in sections)
    assert text.count("```python") == run == 7


def test_the_resnet_becomes_sparse_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n".join(code for _, code in blocks("A ResNet in a plain loop"))
    for written, shorter in _SHORTER.items():
        assert text.count(written) == 1
        text = text.replace(written, shorter)
    names: dict[str, Any] = {"__name__": "tutorial"}
    exec(compile(text, "tutorial.md", "exec"), names)
    report = names["report"]
    assert report["target_reached"] and report["sparsity"] >= 0.8
    assert report["trials"]["tested"] and report["removed_untested"] == 0
    assert (tmp_path / "pruned.safetensors").is_file()
    assert any(isinstance(m, BlockSparseLayer) for m in names["restored"].modules())
    assert not any(isinstance(m, BlockSparseLayer) for m in names["plain"].modules())
    x = names["test_set"].tensors[0][:50]
    results = [names[name].eval()(x) for name in ("restored", "plain")]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_trainer_script_prunes_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dynaprune.integrations.transformers")
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.chdir(tmp_path)
    (downloads, wanted), (runs, script) = blocks("A transformers Trainer")
    assert downloads and not runs
    compile(wanted, "tutorial.md", "exec")
    for name in ("model", "tokenizer", "train_set", "eval_set"):
        assert re.search(rf"^(\w+, )*{name}\b.* = ", wanted, re.MULTILINE)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
    )
    ids = torch.randint(1, 50, (128, 12))
    items = [{"input_ids": row, "labels": int(row[0] > 25)} for row in ids]
    names: dict[str, Any] = {"model": model, "tokenizer": None, "train_set": items, "eval_set": items}
    exec(compile(script, "tutorial.md", "exec"), names)
    report = names["pruning"].pruner.report()
    assert report["target_reached"] and report["sparsity"] >= 0.7
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense, BlockSparseLayer | nn.Linear)
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_lightning_and_accelerate_prune_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return losses(self, batch)[0].mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    def losses(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="none"), y

    data = torch.utils.data.TensorDataset(torch.randn(256, 32), torch.randint(4, (256,)))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    config = dynaprune.PruningConfig(target_sparsity=0.5, block_size=16, total_steps=48, batch_size=16)
    model = Classifier()
    names: dict[str, Any] = {
        "dynaprune": dynaprune,
        "config": config,
        "losses": losses,
        "loader": loader,
        "module": Classifier(),
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3),
        "trial": dynaprune.CalibrationTrial(model, data, losses),
    }
    (_, with_lightning), (_, with_accelerate) = blocks("Lightning and accelerate")
    exec(compile(with_lightning, "tutorial.md", "exec"), names)
    report = names["pruning"].pruner.report()
    assert report["target_reached"] and report["trials"]["tested"]
    exec(compile(with_accelerate, "tutorial.md", "exec"), names)
    for batch in names["loader"]:
        names["accelerator"].backward(losses(names["model"], batch)[0].mean())
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    names["accelerator"].save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", ["experiment.md", "tutorial.md"])
def test_commands_have_the_options_that_are_written(page: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    fenced = re.findall(r"```(\w*)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [
        line.removeprefix("OMP_NUM_THREADS=1 ")
        for language, block in fenced
        if not language
        for line in block.replace("\\\n", " ").splitlines()
        if re.match("(OMP_NUM_THREADS=1 )?dynaprune ", line)
    ]
    assert lines or page == "tutorial.md"
    for line in lines:
        _, command, *words = shlex.split(line, comments=True)
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
        assert command != "compare" or words[0] in [*task_names(), "TASK"], line
