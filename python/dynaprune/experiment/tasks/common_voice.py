"""``common_voice``: clips of Mozilla Common Voice and a Wav2Vec 2.0, by the option ``objective``:

- "language": which of the languages (``locale``) is spoken.
- "ctc": what is said, in characters.

A thousand clips and random weights teach neither; without pretrained weights this task shows that everything
runs. `spoken_digits` is the task on which the same model learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment.tasks import Split, Task, TaskData, accuracy_and_f1
from dynaprune.experiment.tasks.audio import RATE, Clips, padded, read_clips
from dynaprune.experiment.tasks.columns import at, encoded_files, require_columns, texts
from dynaprune.experiment.tasks.ctc import (
    encode,
    error_rates,
    greedy,
    losses_per_symbol,
    plain_text,
    vocabulary,
)
from dynaprune.experiment.tasks.data import data_source, on_hub, read_table, refuse_same_rows, split_train
from dynaprune.experiment.tasks.wav2vec2 import OPTIONS, build, check_options, feature_frames, logits

MAX_SECONDS = {"language": 4.0, "ctc": 8.0}
_NOT_ON_THE_HUB = (
    "Common Voice left the Hugging Face hub in October 2025: get it from Mozilla Data Collective and set "
    "DYNAPRUNE_DATA (or pass --data) to a folder that holds common_voice/train.parquet and "
    "common_voice/test.parquet with the columns audio (a struct with the file's bytes), sentence and locale"
)


def load(split: Split, options: Mapping[str, Any]) -> TaskData:
    """The clips at 16 kHz, each normalised by itself.

    Clips longer than ``max_seconds`` (0: 4 s for languages, 8 s for texts) are cut for "language" and left
    out for "ctc", whose transcripts are of whole clips. ValueError without a data folder."""
    check_options(options)
    objective = options["objective"]
    if objective not in MAX_SECONDS:
        raise ValueError(f"objective must be one of {', '.join(MAX_SECONDS)}, got {objective!r}")
    if on_hub(data_source(split.source)):
        raise ValueError(_NOT_ON_THE_HUB)
    train, source = _table(split.source, "train")
    test, test_source = _table(split.source, "test")
    refuse_same_rows(train, test, test_source)
    locales = np.array(texts(train, "locale", source))
    parts_of = [_Part(train, source, rows) for rows in split_train(locales, split, options["train_samples"])]
    parts_of.append(_Part(test, test_source, np.arange(test.num_rows)))
    make = _languages if objective == "language" else _texts
    parts, classes, said = make(parts_of, options["max_seconds"] or MAX_SECONDS[objective])
    fit, validation, test_clips = parts
    collate, frames = padded(parts)
    description = {
        "source": source,
        "sizes": [len(part) for part in parts],
        "seconds": frames / RATE,
        **said,
    }
    return TaskData(
        fit,
        validation,
        test_clips,
        classes=classes,
        description=description,
        collate=collate,
        options=dict(options),
    )


def _table(source: str | None, part: str) -> tuple[Any, str]:
    table, origin = read_table(source, "common_voice", "", part)
    require_columns(table, ["audio", "sentence", "locale"], origin)
    return table, origin


@dataclass(frozen=True)
class _Part:
    """Rows of a table."""

    table: Any
    origin: str
    rows: np.ndarray

    def texts(self, column: str) -> list[str]:
        every = texts(self.table, column, self.origin)
        return [every[row] for row in self.rows]

    def clips(self, seconds: float) -> list[torch.Tensor]:
        files = encoded_files(self.table, "audio", self.origin)
        return read_clips(files, self.rows.tolist(), seconds, self.origin)


def _languages(given: Sequence[_Part], seconds: float) -> tuple[list[Clips], int, dict[str, Any]]:
    known = sorted(set(given[0].texts("locale")))
    if len(known) < 2:
        raise ValueError(f"{given[0].origin}, column locale: expected several languages, got {known[0]} only")
    parts = []
    for part in given:
        locales = part.texts("locale")
        for row, locale in zip(part.rows.tolist(), locales, strict=True):
            if locale not in known:
                raise ValueError(
                    f"{at(part.origin, row, 'locale')}: expected one of {', '.join(known)} as in the "
                    f"training part, got {locale[:40]!r}"
                )
        parts.append(Clips(part.clips(seconds), [known.index(locale) for locale in locales]))
    chance = 1 / len(known)
    note = (
        f"The accuracy of guessing among the {len(known)} languages is {chance:.2f}: a model trained from "
        "random weights on these few clips stays close to it, so the accuracies here say that everything "
        "runs, not that speech was learnt."
    )
    return parts, len(known), {"languages": known, "chance_accuracy": chance, "note": note}


def _texts(given: Sequence[_Part], seconds: float) -> tuple[list[Clips], None, dict[str, Any]]:
    spoken = [[plain_text(s) for s in part.texts("sentence")] for part in given]
    characters = vocabulary(spoken[0])
    parts, left_out = [], 0
    for part, sentences in zip(given, spoken, strict=True):
        clips, targets = [], []
        for clip, text in zip(part.clips(seconds + 1 / RATE), sentences, strict=True):
            if text and len(clip) <= seconds * RATE:
                clips.append(clip)
                targets.append(encode(text, characters))
        if not clips:
            raise ValueError(
                f"{part.origin}: expected clips of at most {seconds} s with a text, got none in a part"
            )
        left_out += len(sentences) - len(clips)
        parts.append(Clips(clips, targets))
    note = (
        "Speech recognition: the measures to compare with others are test_wer and test_cer (word and "
        "character error rate, 1.00 for a model that writes nothing). The accuracy is the share of spoken "
        "words that were recognised, and F1 the harmonic mean of it and the share of written words that are "
        "right; both are 0 by chance, and near 0 for a model trained from random weights on these few clips."
    )
    said = {"characters": "".join(characters), "left_out": left_out, "chance_accuracy": 0.0, "note": note}
    return parts, None, said


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """``Wav2Vec2ForSequenceClassification`` or ``Wav2Vec2ForCTC``, as the objective asks."""
    if data.classes is not None:
        return build("sequence", data.options, data.classes, dropout)
    return build("ctc", data.options, 3 + len(data.description["characters"]), dropout)


def forward(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Logits ``[n, languages]``; for CTC the logits ``[n, time, symbols]`` and the frames of each clip
    ``[n]``."""
    found = logits(model, inputs)
    return found if found.dim() == 2 else (found, feature_frames(model, inputs))


def losses(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, or CTC loss per symbol, of each clip: float32 ``[n]``."""
    if isinstance(outputs, tuple):
        found, frames = outputs
        return losses_per_symbol(found, frames, targets)
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def predict(outputs: Any) -> Any:
    """The likeliest language ``[n]``, or the symbols of each clip by greedy decoding."""
    return greedy(*outputs) if isinstance(outputs, tuple) else outputs.argmax(dim=-1)


def score(truth: Sequence[Any], guess: Sequence[Any]) -> dict[str, float]:
    """Accuracy and macro F1 of languages; WER, CER and what `error_rates` says of words for texts."""
    return error_rates(truth, guess) if isinstance(truth[0], list) else accuracy_and_f1("macro")(truth, guess)


TASK = Task(
    name="common_voice",
    title="Common Voice clips, Wav2Vec 2.0",
    load=load,
    build_model=build_model,
    forward=forward,
    losses=losses,
    predict=predict,
    score=score,
    evaluation_batch=16,
    options={**OPTIONS, "objective": "language"},
    defaults={
        "epochs": 10,
        "optimizer": "adamw",
        "lr": 5e-4,
        "schedule": "cosine",
        "warmup_steps": 50,
        "max_grad_norm": 1.0,
        "batch_size": 16,
        "weight_decay": 0.01,
        "dropout": 0.1,
        "block_size": 16,
        "target_sparsity": 0.75,
        "pruning": {"end": 0.5},
    },
    self_paced={"interval": 50, "end": 0.5},
)
