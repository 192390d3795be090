"""``titanic``: who survived, 891 passengers (Kaggle's table), MLP with three hidden layers of 256.

Every statistic of the preprocessing (medians, categories, means, deviations) comes from the training part alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dynaprune.tasks import Defaults, Split, Task, TaskData
from dynaprune.tasks.data import mlp, read_table, split_rows

if TYPE_CHECKING:
    import pandas

HUB_NAME = "phihung/titanic"
COLUMNS = ("Survived", "Pclass", "Name", "Sex", "Age", "SibSp", "Parch", "Ticket", "Fare", "Cabin", "Embarked")
NUMERIC = ["Age", "LogFare", "FareEach", "Family", "SibSp", "Parch", "TicketPrefix"]
CATEGORICAL = ["Pclass", "Sex", "Embarked", "Title", "Deck", "FamilyKind"]
HIDDEN = [256, 256, 256]
_TITLES = {"Mlle": "Miss", "Ms": "Miss", "Mme": "Mrs"}
_COMMON_TITLES = ("Mr", "Mrs", "Miss", "Master")


def passenger_features(table: pandas.DataFrame) -> pandas.DataFrame:
    """Columns `NUMERIC` (with gaps where the table has them) and `CATEGORICAL` (strings), row by row: nothing is fitted.

    ValueError where the table lacks one of Kaggle's columns.
    """
    import pandas

    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"expected the columns {', '.join(COLUMNS)}; the table lacks {', '.join(missing)}")
    title = table["Name"].str.extract(r",\s*([^.]+)\.", expand=False).str.strip().replace(_TITLES)
    family = table["SibSp"] + table["Parch"] + 1
    return pandas.DataFrame(
        {
            "Age": table["Age"],
            "LogFare": np.log1p(table["Fare"]),
            "FareEach": np.log1p(table["Fare"] / family),
            "Family": family,
            "SibSp": table["SibSp"],
            "Parch": table["Parch"],
            "TicketPrefix": table["Ticket"].str.match(r"^[A-Za-z]").astype(float),
            "Pclass": table["Pclass"].astype(str),
            "Sex": table["Sex"].astype(str),
            "Embarked": table["Embarked"].astype(object).where(table["Embarked"].notna(), "unknown"),
            "Title": title.where(title.isin(_COMMON_TITLES), "other"),
            "Deck": table["Cabin"].astype(object).where(table["Cabin"].notna(), "unknown").str[0],
            "FamilyKind": np.select([family == 1, family <= 4], ["alone", "small"], "large"),
        }
    )


def preprocessor() -> Any:
    """An unfitted scikit-learn transformer: medians for gaps (with a column that marks them), one-hot, standardised."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numeric = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    categorical = make_pipeline(OneHotEncoder(handle_unknown="ignore", sparse_output=False), StandardScaler())
    return ColumnTransformer([("numeric", numeric, NUMERIC), ("categorical", categorical, CATEGORICAL)])


def prepare(table: pandas.DataFrame, rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[TensorDataset]:
    """Datasets of the (train, validation, test) ``rows``; the transformer is fitted on the first of them only."""
    features = passenger_features(table)
    survived = table["Survived"].to_numpy().astype(np.int64)
    transformer = preprocessor().fit(features.iloc[rows[0]])
    return [
        TensorDataset(
            torch.from_numpy(np.ascontiguousarray(transformer.transform(features.iloc[r]), dtype=np.float32)),
            torch.from_numpy(survived[r]),
        )
        for r in rows
    ]


def load(split: Split) -> TaskData:
    """The 891 labelled passengers, split by stratified draw (Kaggle's test part has no labels)."""
    table, source = read_table(split.source, "titanic", HUB_NAME)
    rows = split_rows(table["Survived"].to_numpy(), split)
    parts = prepare(table, rows)
    description = {
        "source": source,
        "features": int(parts[0].tensors[0].shape[1]),
        "sizes": [len(r) for r in rows],
    }
    return TaskData(*parts, classes=2, description=description)


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """The MLP, as wide at its input as the prepared features are."""
    return mlp([int(data.description["features"]), *HIDDEN, data.classes], dropout)


TASK = Task(
    name="titanic",
    title="Titanic passengers, MLP with three hidden layers of 256",
    load=load,
    build_model=build_model,
    f1_average="binary",
    defaults=Defaults(block_size=16, target_sparsity=0.7),
)
