"""``spoken_digits``: the Free Spoken Digit Dataset (3,000 recordings, 6 speakers), a small Wav2Vec 2.0.

The official split: recordings 0 to 4 of each speaker and digit are the test part. The same speakers are heard
in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaprune.tasks import Defaults, Split, Task, TaskData
from dynaprune.tasks.audio import RATE, Clips, padded, perturb_speed, read_clip
from dynaprune.tasks.data import read_table, split_train
from dynaprune.tasks.wav2vec2 import OPTIONS, build, check_options, logits

HUB_NAME = "mteb/free-spoken-digit-dataset"
MAX_SECONDS = 0.7


def load(split: Split, options: Mapping[str, Any]) -> TaskData:
    """The recordings at 16 kHz, each normalised by itself, cut after ``max_seconds`` (0: 0.7 s)."""
    check_options(options)
    train, source = read_table(split.source, "fsdd", HUB_NAME)
    test, _ = read_table(split.source, "fsdd", HUB_NAME, "test")
    labels = np.array(train.column("label").to_pylist())
    rows = split_train(labels, split, options["train_samples"])
    seconds = options["max_seconds"] or MAX_SECONDS
    fit, validation = (_clips(train.take(part), seconds) for part in rows)
    test_clips = _clips(test, seconds)
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


def _clips(table: Any, seconds: float) -> Clips:
    audio = table.column("audio").to_pylist()
    return Clips([read_clip(a["bytes"], seconds) for a in audio], table.column("label").to_pylist())


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
    defaults=Defaults(
        epochs=10,
        optimizer="adamw",
        lr=1e-3,
        schedule="cosine",
        warmup_steps=100,
        max_grad_norm=1.0,
        weight_decay=0.01,
        dropout=0.1,
        patience=10,
        block_size=16,
        target_sparsity=0.75,
        pruning={"end": 0.5},
        self_paced={"interval": 50, "end": 0.5},
    ),
)
