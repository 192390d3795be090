"""``spoken_digits``: the Free Spoken Digit Dataset (3,000 recordings, 6 speakers), a small Wav2Vec 2.0.

The official split: recordings 0 to 4 of each speaker and digit are the test part. The same speakers are heard
in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment.tasks import Split, Task, TaskData
from dynaprune.experiment.tasks.audio import RATE, Clips, padded, perturb_speed, read_clips
from dynaprune.experiment.tasks.columns import class_labels, encoded_files, require_columns
from dynaprune.experiment.tasks.data import read_table, refuse_same_rows, split_train
from dynaprune.experiment.tasks.wav2vec2 import OPTIONS, build, check_options, logits

HUB_NAME, HUB_REVISION = "mteb/free-spoken-digit-dataset", "c34455c99604d35cb8d27328c267be1478efc903"
MAX_SECONDS = 0.7


def load(split: Split, options: Mapping[str, Any]) -> TaskData:
    """The recordings at 16 kHz, each normalised by itself, cut after ``max_seconds`` (0: 0.7 s)."""
    check_options(options)
    train, files, labels, source = _columns(split.source, "train")
    test, test_files, test_labels, test_source = _columns(split.source, "test")
    refuse_same_rows(train, test, test_source)
    rows = split_train(labels, split, options["train_samples"])
    seconds = options["max_seconds"] or MAX_SECONDS
    fit, validation = (_clips(files, labels, part, seconds, source) for part in rows)
    test_clips = _clips(test_files, test_labels, np.arange(len(test_files)), seconds, test_source)
    collate, frames = padded([fit, validation, test_clips])
    description = {
        "source": source,
        "sizes": [len(fit), len(validation), len(test_clips)],
        "seconds": frames / RATE,
        "chance_accuracy": 0.1,
    }
    return TaskData(
        fit,
        validation,
        test_clips,
        classes=10,
        description=description,
        collate=collate,
        augment=perturb_speed,
        options=dict(options),
    )


def _columns(source: str | None, part: str) -> tuple[Any, list[bytes], np.ndarray, str]:
    table, origin = read_table(source, "fsdd", HUB_NAME, part, HUB_REVISION)
    require_columns(table, ["audio", "label"], origin)
    return table, encoded_files(table, "audio", origin), class_labels(table, "label", 10, origin), origin


def _clips(files: list[bytes], labels: np.ndarray, rows: np.ndarray, seconds: float, origin: str) -> Clips:
    return Clips(read_clips(files, rows.tolist(), seconds, origin), labels[rows].tolist())


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """``Wav2Vec2ForSequenceClassification`` of the size, or with the weights, that the options name."""
    return build("sequence", data.options, 10, dropout)


def forward(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``[n, 10]``."""
    return logits(model, inputs)


TASK = Task(
    name="spoken_digits",
    title="spoken digits (FSDD), Wav2Vec 2.0",
    load=load,
    build_model=build_model,
    forward=forward,
    options=dict(OPTIONS),
    defaults={
        "epochs": 10,
        "optimizer": "adamw",
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "dropout": 0.1,
        "patience": 10,
        "block_size": 16,
        "target_sparsity": 0.75,
        "pruning": {"end": 0.5},
    },
    self_paced={"interval": 50, "end": 0.5},
)
