"""A trial goes the way of a training batch, or is refused at attach; NaN losses are sorted out."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dynaprune
from tests.pruning.attached import batch, mlp, settings, train

ROWS = 256


def each(model: nn.Module, parts: Any) -> Tensor:
    return F.cross_entropy(model(parts[0]), parts[1], reduction="none")


def attached(data: TensorDataset, loss: Any = each, **changes: Any) -> tuple[Any, Any, Any]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trial = dynaprune.CalibrationTrial(model, data, loss, samples=ROWS, batch_size=64)
    return model, optimizer, dynaprune.attach(model, optimizer, settings(**changes), trial=trial)


def spoiled(rows: int, value: float = float("nan")) -> TensorDataset:
    x, y = batch(3, rows=ROWS)
    x[torch.arange(rows) * 7] = value
    return TensorDataset(x, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_single_samples_without_a_finite_loss_are_left_out(value: float) -> None:
    model, optimizer, pruner = attached(spoiled(2, value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
    trials = pruner.report()["trials"]
    assert trials["unusable"] == 0 and trials["samples_left_out"] == 2 * trials["count"] > 0
    assert trials["smallest_sample"] == ROWS - 2
    assert pruner.ledger.passed + pruner.ledger.forced > 0


@pytest.mark.parametrize("rows", [3, 30])
def test_too_many_of_them_remove_nothing_warn_once_and_end_in_an_error(rows: int) -> None:
    model, optimizer, pruner = attached(spoiled(rows))
    with (
        pytest.warns(RuntimeWarning, match=rf"{rows} of {ROWS} losses .* not finite") as said,
        pytest.raises(RuntimeError, match="trial number 3 in a row"),
    ):
        train(model, optimizer)
    assert len([each for each in said if "says nothing" in str(each.message)]) == 1
    assert pruner.ledger.passed == pruner.ledger.forced == 0 and pruner.sparsity == 0
    assert pruner.report()["trials"]["unusable"] == 3


def test_a_usable_trial_between_them_starts_the_count_anew() -> None:
    calls = []

    def sometimes(model: nn.Module, parts: Any) -> Tensor:
        losses = each(model, parts)
        calls.append(None)
        return (
            losses * float("nan") if pruner is not None and pruner.policy.trials.state.events % 2 else losses
        )

    pruner = None
    model, optimizer, pruner = attached(spoiled(0), sometimes)
    with pytest.warns(RuntimeWarning, match="says nothing"):
        train(model, optimizer)
    assert pruner.report()["trials"]["unusable"] > 0 and pruner.policy.trials.state.unusable_in_a_row < 3
    assert pruner.ledger.passed + pruner.ledger.forced > 0


WRONG = {
    "a mean": lambda m, p: F.cross_entropy(m(p[0]), p[1]),
    "a column": lambda m, p: each(m, p).unsqueeze(1),
    "integers": lambda m, p: each(m, p).long(),
    "nothing": lambda m, p: None,
    "a dict": lambda m, p: {"loss": each(m, p)},
    "half of them": lambda m, p: each(m, p)[::2],
    "an error": lambda m, p: m(p["input_ids"]),
    "complex": lambda m, p: each(m, p).to(torch.complex64),
}


@pytest.mark.parametrize("loss", WRONG.values(), ids=list(WRONG))
def test_unusable_losses_are_refused_at_attach_and_nothing_is_changed(loss: Any) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    trial = dynaprune.CalibrationTrial(model, spoiled(0), loss, samples=ROWS, batch_size=64)
    with pytest.raises(
        ValueError, match=r"one floating-point loss per sample, shape \(64,\), for a batch that is"
    ):
        dynaprune.attach(model, torch.optim.Adam(model.parameters()), settings(), trial=trial)
    assert torch.equal(torch.get_rng_state(), state) and trial.draws == 0
    assert all(type(layer) is not nn.Module and layer.training for layer in model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


class Detector(nn.Module):
    """Losses in training mode, boxes in evaluation mode: the interface of detection models."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Linear(32, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(64, 64),
            nn.ReLU(),
        ]
        self.body = nn.Sequential(*layers, nn.Linear(64, 4))

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        boxes = self.body(images)
        if self.training:
            return {"box": F.l1_loss(boxes, targets, reduction="none").mean(1)}
        return [{"boxes": box} for box in boxes]


def test_a_model_with_losses_in_training_mode_only_is_tested_in_it() -> None:
    torch.manual_seed(0)
    model = Detector()
    data = TensorDataset(torch.randn(ROWS, 32), torch.rand(ROWS, 4))
    trial = dynaprune.CalibrationTrial(
        model, data, lambda m, p: sum(m(p[0], p[1]).values()), samples=ROWS, batch_size=64
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruner = dynaprune.attach(model, optimizer, settings(), trial=trial)
    assert trial.in_training_mode
    counted = int(model.body[1].num_batches_tracked)
    assert torch.equal(trial()[0], trial()[0])  # no dropout, and the same statistics
    assert int(model.body[1].num_batches_tracked) == counted and model.body[3].training
    for step in range(24):
        x, t = data[step * 8 : step * 8 + 8]
        optimizer.zero_grad()
        model(x, t)["box"].mean().backward()
        optimizer.step()
    assert pruner.report()["trials"]["count"] > 0 and pruner.sparsity > 0


def test_an_ordinary_model_is_tested_in_evaluation_mode() -> None:
    _, _, pruner = attached(spoiled(0))
    assert not pruner.trial.in_training_mode
