"""Averages of weights that a callback of one's own keeps beside the Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune import DynaPruneCallback
from tests.integrations import trainer_cases
from tests.pruning.edit.test_averaging_recipes import assert_close, dense, live, reference

transformers = pytest.importorskip("transformers")
DECAY = 0.8


class Average(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Averages in place after each step, and densely beside it."""

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
        self.expected, self.was = dense(dict(model.named_parameters()), model), live(model)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.kind == "module":
            for mine, theirs in zip(self.average.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 1 - DECAY)
        elif self.kind == "parameters":
            for name, parameter in model.named_parameters():
                self.average[name].lerp_(parameter, 1 - DECAY)
        else:
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - DECAY)
        alive = live(model)
        kept = {n: t * (self.was[n] & alive[n]) for n, t in self.expected.items()}
        self.expected = reference(kept, dense(dict(model.named_parameters()), model), DECAY)
        self.was = alive
        assert_close(dense(self.tensors(model), model), self.expected)
        self.steps += 1

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        held = dict(self.average.named_parameters()) if self.kind == "module" else self.average
        return {name: held[name] for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", ["module", "parameters", "floats of the state dict"])
def test_an_average_beside_the_trainer_is_the_dense_one(tmp_path: Path, kind: str) -> None:
    model = trainer_cases.bert()
    pruning = DynaPruneCallback(model, trainer_cases.settings(neurons=False), samples=128)
    average = Average(pruning, kind)
    trainer_cases.trainer(tmp_path, pruning, callbacks=(average,)).train()
    assert pruning.pruner is not None and pruning.pruner.target_reached
    assert average.steps == trainer_cases.STEPS
