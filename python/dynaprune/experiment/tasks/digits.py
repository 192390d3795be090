"""``digits``: scikit-learn's bundled handwritten digits (1,797 real 8x8 images, UCI), MLP
64-1024-1024-1024-10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dynaprune.experiment.tasks import Split, Task, TaskData
from dynaprune.experiment.tasks.data import mlp, split_rows

WIDTHS = [64, 1024, 1024, 1024, 10]


def load(split: Split, options: Mapping[str, Any]) -> TaskData:
    """Pixels divided by 16, then standardised per pixel with the training part's mean and deviation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = images.astype(np.float32) / 16
    rows = split_rows(labels, split)
    mean, deviation = pixels[rows[0]].mean(axis=0), pixels[rows[0]].std(axis=0)
    pixels = (pixels - mean) / np.where(deviation > 0, deviation, 1)
    train, validation, test = (
        TensorDataset(torch.from_numpy(pixels[r]), torch.from_numpy(labels[r]).long()) for r in rows
    )
    description = {"source": "sklearn.datasets.load_digits", "features": 64, "sizes": [len(r) for r in rows]}
    return TaskData(train, validation, test, classes=10, description=description)


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """The MLP, with ``dropout`` after each hidden layer where it is above 0."""
    return mlp(WIDTHS, dropout)


TASK = Task(
    name="digits",
    title="handwritten digits (scikit-learn), MLP 64-1024-1024-1024-10",
    load=load,
    build_model=build_model,
    defaults={"pruning": {"end": 0.25}},
    self_paced={"interval": 40, "end": 0.5},
    uses_data_folder=False,
    fixed_test=False,
)
