"""Which model the Trainer takes for the best, and when it stops, while the structure changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynaprune import DynaPruneCallback
from tests.integrations.trainer_cases import (
    STEPS,
    TRAIN,
    VALIDATION,
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


def rejecting() -> Callable[[], Tensor]:
    """A trial that nothing passes: losses that grow by 1 from call to call."""
    calls = iter(range(1, 100))
    return lambda: torch.full((64,), float(next(calls)))


def counting(first: int = 0) -> Any:
    """Metrics that grow from evaluation to evaluation."""
    calls = iter(range(first, 100))
    return lambda _: {"age": next(calls)}


def test_the_best_model_may_have_an_earlier_structure(tmp_path: Path) -> None:
    """Nothing passes the trial, so blocks go by force, also after the schedule's end at step 20."""
    pruning = DynaPruneCallback(
        bert(), settings(target_sparsity=0.9, floor=0.3, neurons=False), trial=rejecting()
    )
    run = trainer(
        tmp_path,
        pruning,
        compute_metrics=counting(),
        metric_for_best_model="age",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    run.train()
    logged = {row["step"]: row["sparsity"] for row in run.state.log_history if "loss" in row}
    assert run.state.best_global_step == 20 and logged[20] < logged[40]
    assert pruning.pruner.sparsity == pytest.approx(logged[20], abs=1e-12)
    best = loaded_model(tmp_path / "checkpoint-20")
    assert all(map(torch.equal, masks(best), masks(run.model)))
    assert agree(logits(best), logits(run.model))
    assert not pruning.pruner.report()["target_reached"]


class Seen(transformers.TrainerCallback):
    """Notes what the Trainer takes for the best when each step begins."""

    def __init__(self) -> None:
        self.best: dict[int, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = (state.best_metric, state.best_global_step, state.best_model_checkpoint)
        self.best[state.global_step] = best


@pytest.mark.parametrize("first", [True, False])
def test_the_trainers_early_stopping_waits_for_the_structure(first: bool, tmp_path: Path) -> None:
    """The metric only gets worse: patience 2 counts from the first eligible evaluation, at step 20."""
    pruning, seen = DynaPruneCallback(bert(), settings(end=0.5)), Seen()
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    after = (seen,) if first else (seen, stopping)
    run = transformers.Trainer(
        pruning.model,
        arguments(
            tmp_path,
            eval_steps=5,
            save_steps=5,
            metric_for_best_model="age",
            greater_is_better=False,
            load_best_model_at_end=True,
        ),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[*([stopping] if first else []), pruning, *after],
        compute_metrics=counting(),
    )
    run.train()
    reached = next(row["step"] for row in pruning.pruner.history if row["sparsity"] >= 0.6 - 1e-9)
    eligible = -(-reached // 5) * 5
    assert 15 <= eligible <= 25
    assert all(seen.best[step] == (None, None, None) for step in range(5, eligible))
    assert run.state.best_global_step == eligible and run.state.global_step == eligible + 10
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{eligible}")
    written = tmp_path / f"checkpoint-{eligible}" / "trainer_state.json"
    assert transformers.TrainerState.load_from_json(written).best_global_step == eligible


def test_patience_of_the_callback_itself_goes_on_after_a_resume(tmp_path: Path) -> None:
    def run(out: Path, resume: Path | None = None) -> Any:
        pruning = DynaPruneCallback(bert(), settings(), patience=3)
        found = trainer(
            out,
            pruning,
            compute_metrics=counting(0 if resume is None else int(resume.name.split("-")[1]) // 5),
            eval_steps=5,
            save_steps=5,
            metric_for_best_model="eval_age",
            greater_is_better=False,
        )
        found.train(resume_from_checkpoint=None if resume is None else str(resume))
        return found

    first = run(tmp_path / "whole")
    stopped = first.state.global_step
    assert 30 <= stopped < STEPS
    folder = tmp_path / "whole" / f"checkpoint-{stopped - 5}"
    assert run(tmp_path / "resumed", folder).state.global_step == stopped
