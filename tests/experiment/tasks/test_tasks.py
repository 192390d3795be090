"""The tasks digits and titanic: what they prepare, and that nothing of the test part gets into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dynaprune.experiment.tasks import Split, get_task, task_names
from dynaprune.experiment.tasks.data import split_rows
from dynaprune.experiment.tasks.titanic import passenger_features, prepare, title_of


def _table(folder: Path) -> pyarrow.Table:
    return parquet.read_table(folder / "titanic" / "train.parquet")


def _split(task: str, folder: Path | None = None, **more: Any) -> Split:
    return Split(seed=0, source=None if folder is None else str(folder), **more)


def test_unknown_tasks_are_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"'mnist'.*digits.*titanic"):
        get_task("mnist")
    assert task_names() == ["digits", "titanic", "cifar10", "imdb", "lm", "common_voice", "spoken_digits"]


def test_digits_are_the_real_images_standardised_by_the_training_part() -> None:
    task = get_task("digits")
    data = task.load(_split("digits"), {})
    assert data.description["sizes"] == [1257, 180, 360] and sum(data.description["sizes"]) == 1797
    inputs, targets = data.train.tensors
    assert inputs.shape == (1257, 64) and inputs.dtype == torch.float32 and targets.dtype == torch.int64
    assert torch.bincount(targets).min() > 100
    mean, deviation = inputs.double().mean(0), inputs.double().std(0, correction=0)
    assert mean.abs().max() < 1e-5
    assert ((deviation - 1).abs() < 1e-4).sum() + (deviation == 0).sum() == 64
    assert data.test.tensors[0].double().mean(0).abs().max() > 0.01
    widths = [tuple(p.shape) for p in task.build_model(data, 0.0).parameters() if p.dim() == 2]
    assert widths == [(1024, 64), (1024, 1024), (1024, 1024), (10, 1024)]


@pytest.mark.parametrize("name", ["digits", "titanic"])
def test_both_arms_start_from_the_same_weights_and_their_losses_are_per_sample(
    name: str, data_dir: Path
) -> None:
    task = get_task(name)
    data = task.load(_split(name, data_dir), {})
    models = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(11)
        models.append(task.build_model(data, dropout))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    inputs, targets = (t[:7] for t in data.train.tensors)
    losses = task.losses(task.forward(models[0], inputs), targets)
    assert losses.shape == (7,)
    single = task.losses(task.forward(models[0], inputs[3:4]), targets[3:4])
    assert torch.allclose(losses[3], single[0], rtol=1e-4)


def test_titanic_is_fitted_on_the_training_part_only(data_dir: Path) -> None:
    """Whatever stands in the other rows, the prepared training part is the same bits, and its columns do not
    move."""
    table = _table(data_dir)
    rows = split_rows(table.column("Survived").to_numpy(), Split(0))
    spoiled = table.to_pylist()
    for row in np.concatenate(rows[1:]):
        spoiled[row].update(
            Age=1e6, Fare=1e9, SibSp=50, Parch=70, Embarked="X", Cabin="Z99", Name="Doe, Sultan. J", Pclass=9
        )
    before = prepare(table, rows)
    after = prepare(pyarrow.Table.from_pylist(spoiled, schema=table.schema), rows)
    assert torch.equal(before[0].tensors[0], after[0].tensors[0])
    assert before[0].tensors[0].shape[1] == after[2].tensors[0].shape[1]
    assert not torch.equal(before[2].tensors[0], after[2].tensors[0])

    alone = prepare(table.take(rows[0]), tuple(np.arange(len(rows[0])) for _ in range(3)))  # type: ignore[arg-type]
    assert torch.equal(before[0].tensors[0], alone[0].tensors[0])


def test_titanic_inputs_are_finite_standardised_and_without_the_answer(data_dir: Path) -> None:
    data = get_task("titanic").load(_split("titanic", data_dir, fold=1, folds=5), {})
    assert sum(data.description["sizes"]) == 891
    inputs, survived = data.train.tensors
    for part in (data.train, data.validation, data.test):
        assert torch.isfinite(part.tensors[0]).all()
    assert inputs.double().mean(0).abs().max() < 1e-5
    answer = survived.double() - survived.double().mean()
    correlation = (inputs.double() * answer[:, None]).mean(0) / answer.std(correction=0)
    assert correlation.abs().max() < 0.7


def test_passenger_features_row_by_row() -> None:
    row = dict(Survived=1, Pclass=3, Name="Braund, Mr. Owen Harris", Sex="male", Age=None, SibSp=1, Parch=2)
    row |= dict(Ticket="A/5 21171", Fare=8.0, Cabin=None, Embarked="S")
    table = pyarrow.Table.from_pylist([row, row | dict(Age=4.0, Cabin="C85", SibSp=0, Parch=0, Ticket="17")])
    numeric, categorical = passenger_features(table)
    assert np.isnan(numeric[0, 0]) and numeric[1, 0] == 4
    assert numeric[0, 1:].tolist() == pytest.approx([np.log(9), np.log(3), 4, 1, 2, 1])
    assert numeric[1, 3:].tolist() == [1, 0, 0, 0]
    assert categorical.tolist() == [
        ["3", "male", "S", "Mr", "u", "small"],
        ["3", "male", "S", "Mr", "C", "alone"],
    ]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("Heikkinen, Miss. Laina", "Miss"),
        ("Sagesser, Mlle. Emma", "Miss"),
        ("Rothes, the Countess. of (Lucy)", "other"),
        ("Palsson, Master. Gosta Leonard", "Master"),
        ("no comma", "other"),
    ],
)
def test_titles(name: str, title: str) -> None:
    assert title_of(name) == title


def test_a_table_without_a_column_is_refused(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="lacks Cabin"):
        passenger_features(_table(data_dir).drop_columns(["Cabin"]))
