"""``titanic``: who survived, 891 passengers (Kaggle's table), MLP with three hidden layers of 256.

Every statistic of the preprocessing (medians, categories, means, deviations) comes from the training part
alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dynaprune.experiment.tasks import Split, Task, TaskData, accuracy_and_f1
from dynaprune.experiment.tasks.columns import categories, class_labels, numbers, require_columns, texts
from dynaprune.experiment.tasks.data import mlp, read_table, split_rows

if TYPE_CHECKING:
    import pyarrow

# No commit of this data set is known for certain: `read_table` takes its newest, and the report names it.
HUB_NAME = "phihung/titanic"
ORIGIN = "titanic/train.parquet"
COLUMNS = (
    "Survived",
    "Pclass",
    "Name",
    "Sex",
    "Age",
    "SibSp",
    "Parch",
    "Ticket",
    "Fare",
    "Cabin",
    "Embarked",
)
NUMERIC = ("age", "log fare", "log fare each", "family", "siblings", "parents", "ticket prefix")
CATEGORICAL = ("class", "sex", "port", "title", "deck", "family kind")
HIDDEN = [256, 256, 256]
_TITLES = {"Mlle": "Miss", "Ms": "Miss", "Mme": "Mrs"}
_COMMON_TITLES = ("Mr", "Mrs", "Miss", "Master")


def title_of(name: str) -> str:
    """Mr, Mrs, Miss or Master out of "Braund, Mr. Owen Harris"; "other" for the rare ones."""
    found = re.search(r",\s*([^.]+)\.", name)
    title = found.group(1).strip() if found else ""
    title = _TITLES.get(title, title)
    return title if title in _COMMON_TITLES else "other"


def passenger_features(table: pyarrow.Table, origin: str = ORIGIN) -> tuple[np.ndarray, np.ndarray]:
    """``(numeric [n, 7] with NaN for gaps, categorical [n, 6] strings)``, row by row: nothing is fitted here.

    ValueError where the table lacks one of Kaggle's columns, or a cell is not of its column's kind.
    """
    require_columns(table, COLUMNS, origin)
    siblings, parents = (numbers(table, name, origin, whole=True) for name in ("SibSp", "Parch"))
    fare = numbers(table, "Fare", origin)
    family = siblings + parents + 1
    prefix = np.array([float(ticket[:1].isalpha()) for ticket in categories(table, "Ticket", origin)])
    numeric = [
        numbers(table, "Age", origin),
        np.log1p(fare),
        np.log1p(fare / family),
        family,
        siblings,
        parents,
        prefix,
    ]
    categorical = [
        categories(table, "Pclass", origin),
        categories(table, "Sex", origin),
        categories(table, "Embarked", origin),
        [title_of(name) for name in texts(table, "Name", origin)],
        [cabin[0] for cabin in categories(table, "Cabin", origin)],
        np.select([family == 1, family <= 4], ["alone", "small"], "large"),
    ]
    return np.column_stack(numeric), np.column_stack([np.array(c, dtype=object) for c in categorical])


def prepare(
    table: pyarrow.Table, rows: tuple[np.ndarray, np.ndarray, np.ndarray], origin: str = ORIGIN
) -> list[TensorDataset]:
    """Datasets of the (train, validation, test) ``rows``: medians for gaps (with a column that marks them),
    one-hot categories, standardised; all of it fitted on the first part of the rows only."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numeric, categorical = passenger_features(table, origin)
    survived = class_labels(table, "Survived", 2, origin)
    gaps = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    kinds = make_pipeline(OneHotEncoder(handle_unknown="ignore", sparse_output=False), StandardScaler())
    gaps.fit(numeric[rows[0]])
    kinds.fit(categorical[rows[0]])
    parts = []
    for part in rows:
        inputs = np.hstack([gaps.transform(numeric[part]), kinds.transform(categorical[part])]).astype(
            np.float32
        )
        parts.append(TensorDataset(torch.from_numpy(inputs), torch.from_numpy(survived[part])))
    return parts


def load(split: Split, options: Mapping[str, Any]) -> TaskData:
    """The 891 labelled passengers, split by stratified draw (Kaggle's test part has no labels)."""
    table, source = read_table(split.source, "titanic", HUB_NAME)
    require_columns(table, COLUMNS, source)
    rows = split_rows(class_labels(table, "Survived", 2, source), split)
    train, validation, test = prepare(table, rows, source)
    description = {
        "source": source,
        "features": int(train.tensors[0].shape[1]),
        "sizes": [len(r) for r in rows],
    }
    return TaskData(train, validation, test, classes=2, description=description)


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """The MLP, as wide at its input as the prepared features are."""
    return mlp([int(data.description["features"]), *HIDDEN, 2], dropout)


TASK = Task(
    name="titanic",
    title="Titanic passengers, MLP with three hidden layers of 256",
    load=load,
    build_model=build_model,
    fixed_test=False,
    score=accuracy_and_f1("binary"),
    defaults={"block_size": 16, "target_sparsity": 0.7, "pruning": {"end": 0.15}},
    self_paced={"interval": 20, "end": 0.5},
)
