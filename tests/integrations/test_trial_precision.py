"""A trial's batch goes the way of a training batch: precision, transfer hooks, autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune import CalibrationTrial, DynaPruneLightningCallback
from tests.integrations.test_lightning import Module, loader, settings, trainer
from tests.integrations.trainer_cases import bert
from tests.integrations.trainer_cases import settings as bert_settings
from tests.integrations.trainer_cases import trainer as transformers_trainer


class Watched(Module):
    """Writes down in what dtypes training and the trial compute."""

    def __init__(self) -> None:
        super().__init__()
        self.training_saw: set[tuple[torch.dtype, torch.dtype]] = set()
        self.trial_saw: set[tuple[torch.dtype, torch.dtype]] = set()

    def training_step(self, parts: list[Tensor], _: int) -> Tensor:
        logits = self(parts[0])
        self.training_saw.add((parts[0].dtype, logits.dtype))
        return nn.functional.cross_entropy(logits, parts[1])

    def losses(self, parts: list[Tensor]) -> Tensor:
        logits = self(parts[0])
        self.trial_saw.add((parts[0].dtype, logits.dtype))
        return nn.functional.cross_entropy(logits.float(), parts[1], reduction="none")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore")
def test_the_trial_computes_as_lightning_trains(precision: str, tmp_path: Path) -> None:
    module = Watched()
    pruning = DynaPruneLightningCallback(settings(), loss=lambda model, parts: model.losses(parts))  # type: ignore[operator]
    trainer(tmp_path, pruning, precision=precision).fit(module, loader())
    assert pruning.pruner is not None and pruning.pruner.report()["trials"]["tested"] > 0
    assert module.trial_saw == module.training_saw
    assert module.training_saw == {
        {
            "32-true": (torch.float32, torch.float32),
            "64-true": (torch.float64, torch.float64),
            "bf16-true": (torch.bfloat16, torch.bfloat16),
            "bf16-mixed": (torch.float32, torch.bfloat16),
        }[precision]
    }


@pytest.mark.filterwarnings("ignore")
def test_the_trial_gets_its_batch_through_the_transfer_hooks(tmp_path: Path) -> None:
    means: dict[str, list[float]] = {"training": [], "trial": []}

    class Shifted(Watched):
        def on_before_batch_transfer(self, parts: list[Tensor], _: int) -> list[Tensor]:
            return [parts[0] + 100, parts[1]]

        def on_after_batch_transfer(self, parts: list[Tensor], _: int) -> list[Tensor]:
            return [parts[0] * 2, parts[1]]

        def training_step(self, parts: list[Tensor], number: int) -> Tensor:
            means["training"].append(float(parts[0].mean()))
            return super().training_step(parts, number)

        def losses(self, parts: list[Tensor]) -> Tensor:
            means["trial"].append(float(parts[0].mean()))
            return super().losses(parts)

    pruning = DynaPruneLightningCallback(settings(), loss=lambda model, parts: model.losses(parts))  # type: ignore[operator]
    trainer(tmp_path, pruning).fit(Shifted(), loader())
    assert means["trial"] and all(198 < mean < 202 for mean in means["training"] + means["trial"])


@pytest.mark.filterwarnings("ignore")
def test_the_trial_of_a_transformers_trainer_runs_under_its_autocast(tmp_path: Path) -> None:
    pruning = dynaprune.DynaPruneCallback(bert(), bert_settings(neurons=False))
    inner: set[torch.dtype] = set()
    layer = pruning.model.bert.encoder.layer[0].output.dense  # type: ignore[union-attr]
    layer.register_forward_hook(
        lambda module, _, output: None if module.training else inner.add(output.dtype)
    )
    transformers_trainer(tmp_path, pruning, bf16=True, save_strategy="no", eval_strategy="no").train()
    assert pruning.pruner is not None and pruning.pruner.report()["trials"]["tested"] > 0
    assert inner == {torch.bfloat16}


def test_a_trial_of_ones_own_context_and_move() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    rows = [(torch.full((8,), float(i)), i % 4) for i in range(300)]
    seen = set()

    def losses(model: nn.Module, parts: Any) -> Tensor:
        logits = model(parts["x"])
        seen.add(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), parts["y"], reduction="none")

    trial = CalibrationTrial(
        model,
        rows,
        losses,
        move=lambda parts: {"x": parts[0], "y": parts[1]},
        context=lambda: torch.autocast("cpu", torch.bfloat16),
    )
    trial.try_batch()
    assert trial()[0].shape == (300,) and seen == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")
    for wrong in ({"move": 3}, {"context": 3}):
        with pytest.raises(TypeError, match="callables"):
            CalibrationTrial(model, rows, losses, **wrong)  # type: ignore[arg-type]


def test_a_dry_run_that_fails_names_the_context() -> None:
    model = nn.Sequential(nn.Linear(8, 4)).bfloat16()
    rows = [(torch.zeros(8), 0) for _ in range(300)]
    trial = CalibrationTrial(
        model, rows, lambda model, parts: nn.functional.cross_entropy(model(parts[0]), parts[1])
    )
    with pytest.raises(ValueError, match=r"give the trial context=lambda: torch\.autocast"):
        trial.try_batch()
