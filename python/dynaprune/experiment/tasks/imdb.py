"""``imdb``: is a film review positive (Maas et al. 2011, 25,000 for training, 25,000 for testing), BERT.

Training samples are padded to one length. At 32 a batch nearly every batch holds a review of full length
anyway (a quarter are longer than 384 tokens), and so every step costs the same: FLOPs and seconds at the
start and the end of a training compare steps, not reviews. Validation and test reviews are evaluated in the
order of their length, each batch as long as its longest review.

Dropout is applied to embeddings, layers and the classifier, not to attention weights: with it torch leaves
its fused attention, and the baseline would look slow for a reason that has nothing to do with pruning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment.tasks import Split, Task, TaskData, accuracy_and_f1
from dynaprune.experiment.tasks.columns import class_labels, require_columns, texts
from dynaprune.experiment.tasks.data import on_hub, read_table, split_train
from dynaprune.experiment.tasks.masked_language import pretrain
from dynaprune.experiment.tasks.text import (
    Texts,
    collate,
    drop_words,
    encode,
    fingerprint,
    read_vocabulary,
    tokenizer_of,
    train_vocabulary,
)

HUB_NAME, HUB_REVISION = "stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"
HUB_MODEL = "google-bert/bert-base-uncased"
HUB_MODEL_REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"
BASE_VOCABULARY = Path("hf_configs/bert-base-uncased/vocab.txt")
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


@dataclass(frozen=True)
class Size:
    """A BERT that starts from random weights; ``positions`` 0: as many as a sample has tokens."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    positions: int = 0


SIZES = {
    "tiny": Size(2_000, 128, 2, 2, 512),
    "small": Size(8_000, 192, 4, 6, 768),
    "base": Size(30_522, 768, 12, 12, 3072, positions=512),
}


@dataclass(frozen=True, kw_only=True)
class ReviewData(TaskData):
    """The reviews, the tokenizer, and what the model is made of: a ``BertConfig``, and the folder of its
    weights where it is pretrained."""

    tokenizer: Any
    model_config: Any
    weights: Path | None


def clean(text: str) -> str:
    """The text without the line breaks' markup."""
    return text.replace("<br />", " ")


def _columns(source: str | None, part: str) -> tuple[np.ndarray, np.ndarray, str]:
    table, origin = read_table(source, "imdb", HUB_NAME, part, HUB_REVISION)
    require_columns(table, ["text", "label"], origin)
    labels = class_labels(table, "label", 2, origin)
    return np.array(texts(table, "text", origin), dtype=object), labels, origin


def pretrained_folder(init: str) -> Path:
    """The folder with a pretrained BERT: ``init`` itself, or for "pretrained" bert-base-uncased of the hub.

    ValueError for a folder that is none or lacks a file; ConnectionError, with what to do, where the hub
    cannot be reached."""
    if init == "pretrained":
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(HUB_MODEL, revision=HUB_MODEL_REVISION, allow_patterns=list(_MODEL_FILES))
            )
        except Exception as error:
            raise ConnectionError(
                f"could not load {HUB_MODEL!r} from the hub ({type(error).__name__}: {error}). On a machine "
                "without network: give --init a local folder that holds the model's config.json, "
                "model.safetensors and vocab.txt, or --init scratch"
            ) from error
    folder = Path(init).expanduser()
    if not folder.is_dir():
        raise ValueError(f"init must be scratch, pretrained or an existing folder, got {init!r}")
    wanted = [["config.json"], ["model.safetensors"], ["tokenizer.json", "vocab.txt"]]
    if missing := [" or ".join(names) for names in wanted if not any((folder / n).is_file() for n in names)]:
        raise ValueError(f"expected a pretrained BERT in the folder {init}; it lacks {', '.join(missing)}")
    return folder


def _pretrained(init: str) -> tuple[Any, Any, Path, dict[str, Any]]:
    from transformers import AutoConfig, AutoTokenizer

    folder = pretrained_folder(init)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type != "bert":
        raise ValueError(f"expected a model of type bert in {init}, got {config.model_type!r}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return config, tokenizer, folder, _vocabulary_notes([piece for piece, _ in pieces], "pretrained model")


def _from_scratch(
    name: str, texts: list[str], source: str | None, max_length: int
) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import BertConfig

    if name not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {name!r}")
    size = SIZES[name]
    given = source or os.environ.get("DYNAPRUNE_DATA")
    file = Path(given).expanduser() / BASE_VOCABULARY if given and not on_hub(given) else None
    if name == "base" and file is not None and file.is_file():
        vocabulary, origin = read_vocabulary(file), str(BASE_VOCABULARY)
    else:
        vocabulary, origin = train_vocabulary(texts, size.vocabulary), "trained on the training part"
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.feed_forward,
        max_position_embeddings=size.positions or max_length,
        pad_token_id=vocabulary.index("[PAD]"),
    )
    return config, tokenizer_of(vocabulary), _vocabulary_notes(vocabulary, origin)


def _vocabulary_notes(vocabulary: list[str], origin: str) -> dict[str, Any]:
    return {"entries": len(vocabulary), "origin": origin, "sha256": fingerprint(vocabulary)}


def load(split: Split, options: Mapping[str, Any]) -> ReviewData:
    """The official test reviews; validation drawn from the others. Folds are refused: the test part is fixed.

    The vocabulary of a model that starts from scratch comes from the training part alone."""
    reviews, labels, origin = _columns(split.source, "train")
    test_reviews, test_labels, test_origin = _columns(split.source, "test")
    if np.array_equal(reviews, test_reviews):
        raise ValueError(f"{test_origin} has the same {len(reviews)} reviews as the training part")
    rows = split_train(labels, split, options["train_samples"])
    train_texts = [clean(text) for text in reviews[rows[0]]]
    max_length, init, folder = options["max_length"], options["init"], None
    if init == "scratch":
        config, tokenizer, vocabulary = _from_scratch(options["size"], train_texts, split.source, max_length)
    else:
        config, tokenizer, folder, vocabulary = _pretrained(init)
    if not 8 <= max_length <= config.max_position_embeddings:
        raise ValueError(
            f"max_length must be from 8 to the model's {config.max_position_embeddings} positions, got "
            f"{max_length}"
        )
    config.num_labels = 2
    train = Texts(encode(tokenizer, train_texts), labels[rows[0]], tokenizer, max_length, padded=True)
    evaluated = []
    for part, part_labels in ((reviews[rows[1]], labels[rows[1]]), (test_reviews, test_labels)):
        tokens = encode(tokenizer, [clean(text) for text in part])
        order = np.argsort([len(each) for each in tokens], kind="stable")
        tokens = [tokens[i] for i in order]
        evaluated.append(Texts(tokens, part_labels[order], tokenizer, max_length, padded=False))
    lengths = np.diff(train.ends, prepend=0) + 2
    description = {
        "source": origin,
        "sizes": [len(train), *(len(part) for part in evaluated)],
        "init": init,
        "size": options["size"] if init == "scratch" else "as pretrained",
        "vocabulary": vocabulary,
        "max_length": max_length,
        "tokens_mean": float(np.minimum(lengths, max_length).mean()),
        "texts_cut": float((lengths > max_length).mean()),
    }
    return ReviewData(
        train,
        evaluated[0],
        evaluated[1],
        classes=2,
        description=description,
        collate=collate,
        augment=drop_words if init == "scratch" else None,
        options=dict(options),
        tokenizer=tokenizer,
        model_config=config,
        weights=folder,
    )


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """``BertForSequenceClassification`` with two classes, float32."""
    from copy import deepcopy

    from transformers import BertForSequenceClassification

    assert isinstance(data, ReviewData)
    config = deepcopy(data.model_config)
    config.hidden_dropout_prob = config.classifier_dropout = dropout
    config.attention_probs_dropout_prob = 0.0
    if data.weights is None:
        return BertForSequenceClassification(config)
    return BertForSequenceClassification.from_pretrained(
        data.weights, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``[n, 2]``."""
    logits: torch.Tensor = model(**inputs).logits
    return logits


_PRUNING = {"exclude": ["bert.pooler"]}

TASK = Task(
    name="imdb",
    title="IMDB film reviews, BERT",
    load=load,
    build_model=build_model,
    score=accuracy_and_f1("binary"),
    defaults={
        "epochs": 3,
        "optimizer": "adamw",
        "lr": 5e-4,
        "schedule": "linear",
        "warmup_steps": 200,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "patience": 3,
        "dropout": 0.1,
        "target_sparsity": 0.75,
        "pruning": {"end": 0.5, **_PRUNING},
    },
    self_paced={"end": 0.5, **_PRUNING},
    options={"train_samples": 0, "size": "small", "init": "scratch", "max_length": 384, "pretrain_epochs": 0},
    presets={
        "trainer-original": {
            "epochs": 3,
            "optimizer": "adamw",
            "lr": 3e-5,
            "schedule": "linear",
            "warmup_steps": 500,
            "max_grad_norm": 1.0,
            "batch_size": 16,
            "weight_decay": 0.01,
            "options": {"init": "pretrained"},
        }
    },
    forward=forward,
    pretrain=pretrain,
)
