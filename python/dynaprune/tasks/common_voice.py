"""``common_voice``: clips of Mozilla Common Voice and a Wav2Vec 2.0, by the option ``objective``:

- "language": which of the languages (``locale``) is spoken.
- "ctc": what is said, in characters.

A thousand clips and random weights teach neither; without pretrained weights this task shows that everything
runs. `spoken_digits` is the task on which the same model learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaprune.tasks import Defaults, Split, Task, TaskData, accuracy_and_f1
from dynaprune.tasks.audio import RATE, Clips, padded, read_clip
from dynaprune.tasks.ctc import encode, error_rates, greedy, losses_per_symbol, plain_text, vocabulary
from dynaprune.tasks.data import data_source, read_table, split_train
from dynaprune.tasks.wav2vec2 import OPTIONS, build, check_options, feature_frames, logits

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
    if data_source(split.source) == "hub":
        raise ValueError(_NOT_ON_THE_HUB)
    train, source = read_table(split.source, "common_voice", "")
    test, _ = read_table(split.source, "common_voice", "", "test")
    rows = split_train(np.array(train.column("locale").to_pylist()), split, options["train_samples"])
    tables = [*(train.take(part) for part in rows), test]
    make = _languages if objective == "language" else _texts
    parts, classes, said = make(tables, options["max_seconds"] or MAX_SECONDS[objective])
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


def _languages(tables: Sequence[Any], seconds: float) -> tuple[list[Clips], int, dict[str, Any]]:
    known = sorted(set(tables[0].column("locale").to_pylist()))
    parts = []
    for table in tables:
        locales = table.column("locale").to_pylist()
        foreign = sorted(set(locales) - set(known))
        if foreign:
            raise ValueError(f"expected the locales {', '.join(known)} of the training part, got {foreign}")
        clips = [read_clip(a["bytes"], seconds) for a in table.column("audio").to_pylist()]
        parts.append(Clips(clips, [known.index(locale) for locale in locales]))
    chance = 1 / len(known)
    note = (
        f"The accuracy of guessing among the {len(known)} languages is {chance:.2f}: a model trained from "
        "random weights on these few clips stays close to it, so the accuracies here say that everything "
        "runs, not that speech was learnt."
    )
    return parts, len(known), {"languages": known, "chance_accuracy": chance, "note": note}


def _texts(tables: Sequence[Any], seconds: float) -> tuple[list[Clips], None, dict[str, Any]]:
    texts = [[plain_text(s) for s in table.column("sentence").to_pylist()] for table in tables]
    characters = vocabulary(texts[0])
    parts, left_out = [], 0
    for table, sentences in zip(tables, texts, strict=True):
        clips, targets = [], []
        for audio, text in zip(table.column("audio").to_pylist(), sentences, strict=True):
            clip = read_clip(audio["bytes"], seconds + 1 / RATE)
            if text and len(clip) <= seconds * RATE:
                clips.append(clip)
                targets.append(encode(text, characters))
        if not clips:
            raise ValueError(f"expected clips of at most {seconds} s with a text, got none in a part")
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
    defaults=Defaults(
        epochs=10,
        optimizer="adamw",
        lr=5e-4,
        schedule="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        batch_size=16,
        weight_decay=0.01,
        dropout=0.1,
        block_size=16,
        target_sparsity=0.75,
        pruning={"end": 0.5},
        self_paced={"interval": 50, "end": 0.5},
    ),
)
