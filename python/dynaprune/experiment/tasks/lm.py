"""``lm``: a language model of IMDB's film reviews, the next token after the ones before it.

The reviews follow each other with an end of text between them and are cut into blocks of ``context`` tokens,
each of which is predicted once, from those before it in its block. A sample is a block: its loss, which the
trial tests, is the mean over its tokens.

Validation text is a twentieth of the training reviews, drawn by the seed; test text every twentieth of the
test reviews: half a million tokens each, which resolve differences of a hundredth of a nat and take a few
percent of the time of a training. No text is in two parts: reviews that occur twice are taken once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dynaprune.experiment.tasks import Split, Task, TaskData
from dynaprune.experiment.tasks.byte_pairs import kept_pairs, numbered, text_stream, tokenizer_of, train_pairs
from dynaprune.experiment.tasks.columns import require_columns, texts
from dynaprune.experiment.tasks.data import read_table
from dynaprune.experiment.tasks.imdb import HUB_NAME, HUB_REVISION, clean
from dynaprune.experiment.tasks.llama import (
    Size,
    build,
    llama_config,
    logits,
    narrower,
    narrower_inside,
    size_of,
)
from dynaprune.experiment.tasks.metric import NATS, PERPLEXITY
from dynaprune.experiment.tasks.text import fingerprint

VOCABULARY = 2048
VOCABULARY_FILE = "vocabulary.json"
_HELD_OUT = 20
# Byte pairs of four million characters are those of the whole text but for the rarest, in a seventh of the
# time.
_VOCABULARY_CHARACTERS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class LanguageData(TaskData):
    """Blocks of tokens and the ``tokenizers.Tokenizer`` that made them."""

    tokenizer: Any


def split_texts(
    train: Iterable[str], test: Iterable[str], seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and test texts without one that is in two of them, in an order drawn by ``seed``.

    The test texts, every twentieth of those that are no training text, are the same for every seed.
    ValueError for fewer than two training texts or no test text."""
    known = dict.fromkeys(train)
    fresh = [text for text in dict.fromkeys(test) if text not in known]
    if len(known) < 2 or not fresh:
        raise ValueError(
            f"expected at least two training texts and a test text that is none of them, got {len(known)} "
            f"and {len(fresh)}"
        )
    draw = np.random.default_rng(seed)
    distinct = list(known)
    order = [distinct[i] for i in draw.permutation(len(distinct))]
    held_out = max(len(known) // _HELD_OUT, 1)
    return order[held_out:], order[:held_out], fresh[::_HELD_OUT]


def blocks_of(stream: np.ndarray, context: int) -> TensorDataset:
    """``(tokens, the token after each)``, both int32 ``[context]``: consecutive pieces of the ``stream``,
    int32 ``[length]``. What does not fill a block is left out; every sample is a view of the stream.

    ValueError where there is no block."""
    count = (len(stream) - 1) // context
    if count < 1:
        raise ValueError(f"expected text of more than {context} tokens for a block, got {len(stream)}")
    tokens = torch.from_numpy(stream[: count * context + 1])
    return TensorDataset(tokens[:-1].view(count, context), tokens[1:].view(count, context))


def _reviews(source: str | None, part: str) -> tuple[list[str], str]:
    table, origin = read_table(source, "imdb", HUB_NAME, part, HUB_REVISION)
    require_columns(table, ["text"], origin)
    return [clean(text) for text in texts(table, "text", origin)], origin


def _vocabulary_text(train: Sequence[str]) -> Sequence[str]:
    ends = np.cumsum([len(text) for text in train])
    return train[: int(np.searchsorted(ends, _VOCABULARY_CHARACTERS)) + 1]


def _check(split: Split, options: Mapping[str, Any]) -> None:
    size, context, tokens = options["size"], options["context"], options["tokens"]
    if split.folds is not None:
        raise ValueError("the test part stays as it is in every run: repeat over --seeds, not over --folds")
    size_of(size)
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    if tokens != 0 and tokens < context:
        raise ValueError(f"tokens must be 0 (all) or at least a block of {context}, got {tokens}")


def load(split: Split, options: Mapping[str, Any]) -> LanguageData:
    """Blocks of ``context`` tokens; ``tokens`` above 0 trains on the first so many.

    The vocabulary comes from the training part alone and does not depend on ``tokens``; it is kept in the
    folder ``split.kept`` where there is one. Validation and test part have no more tokens than the training
    part. ValueError for folds: the test part is fixed."""
    _check(split, options)
    size, context, wanted = options["size"], options["context"], options["tokens"]
    reviews, origin = _reviews(split.source, "train")
    test_reviews, test_origin = _reviews(split.source, "test")
    if reviews == test_reviews:
        raise ValueError(f"{test_origin} has the same {len(reviews)} reviews as the training part")
    train, validation, test = split_texts(reviews, test_reviews, split.seed)
    sample = _vocabulary_text(train)
    if split.kept is None:
        pairs = train_pairs(sample, VOCABULARY)
    else:
        pairs = kept_pairs(split.kept / VOCABULARY_FILE, sample, VOCABULARY)
    tokenizer, entries = tokenizer_of(pairs), list(numbered(pairs))
    stream = text_stream(tokenizer, train, wanted + 1 if wanted else None)
    if len(stream) <= wanted:
        raise ValueError(f"tokens must be 0 (all) or at most {len(stream) - 1}, got {wanted}")
    parts = [blocks_of(stream, context)]
    parts += [blocks_of(text_stream(tokenizer, each, len(stream)), context) for each in (validation, test)]
    tokens = [len(part) * context for part in parts]
    tested = tokenizer.decode(parts[2].tensors[1].flatten().tolist())
    bytes_per_token = len(tested.encode()) / tokens[2]
    note = (
        f"Nats and perplexity are per token of {len(entries):,} byte pairs ({bytes_per_token:.2f} bytes of "
        f"text each); lower is better. An epoch is {tokens[0]:,} tokens in blocks of {context}."
    )
    description = {
        "source": origin,
        "sizes": [len(part) for part in parts],
        "tokens": tokens,
        "context": context,
        "size": size,
        "vocabulary": {
            "entries": len(entries),
            "origin": "trained on the training part",
            "sha256": fingerprint(entries),
        },
        "bytes_per_token": bytes_per_token,
        "note": note,
    }
    return LanguageData(
        parts[0],
        parts[1],
        parts[2],
        classes=None,
        description=description,
        options=dict(options),
        tokenizer=tokenizer,
    )


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """A Llama of the option ``size``."""
    entries = data.description["vocabulary"]["entries"]
    return build(llama_config(size_of(data.options["size"]), entries, data.options["context"], dropout))


def _options_of(
    options: Mapping[str, Any], sizes: Callable[[Size], list[list[Size]]]
) -> list[list[dict[str, Any]]]:
    return [[{**options, "size": str(size)} for size in some] for some in sizes(size_of(options["size"]))]


def losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the tokens of each block, in nats: float32 ``[n]``.

    Args:
        outputs: logits ``[n, context, entries]``.
        targets: the token after each, int ``[n, context]``."""
    by_token = nn.functional.cross_entropy(
        outputs.float().flatten(0, 1), targets.long().flatten(), reduction="none"
    )
    return by_token.view(targets.shape).mean(1)


def score_of_loss(loss: float) -> dict[str, float]:
    """Nats per token, which the mean loss over blocks of one length is, and their exponential."""
    return {"nats": loss, "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp())}


TASK = Task(
    name="lm",
    title="Language model of IMDB film reviews, Llama",
    load=load,
    build_model=build_model,
    metrics=(NATS, PERPLEXITY),
    score_of_loss=score_of_loss,
    defaults={
        "epochs": 1,
        "optimizer": "adamw",
        "lr": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 100,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "dropout": 0.0,
        "block_size": 16,
        "target_sparsity": 0.75,
        "calibration_samples": 256,
        "pruning": {"end": 0.5},
    },
    self_paced={"end": 0.5},
    options={"tokens": 0, "size": "small", "context": 128},
    evaluation_batch=32,
    forward=logits,
    losses=losses,
    width_option="size",
    narrower={
        "small": functools.partial(_options_of, sizes=narrower),
        "small-inner": functools.partial(_options_of, sizes=narrower_inside),
    },
)
