"""A small BERT, a task that it can learn, and the Trainer around both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynaprune import DynaPruneCallback, PruningConfig
from dynaprune.nn import BlockSparseLayer

transformers = pytest.importorskip("transformers")

STEPS = 40


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of 12 tokens from one of two overlapping vocabularies, the class."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 2, (count,), generator=generator)
        tokens = torch.randint(2, 26, (count, 12), generator=generator)
        self.tokens = tokens + 16 * self.labels.unsqueeze(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


TRAIN, VALIDATION = Rows(512, 0), Rows(128, 1)


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **{**sizes, **changes})
    return transformers.BertForSequenceClassification(config)


def settings(**changes: Any) -> PruningConfig:
    """Few steps, whose trials may cost what they like."""
    chosen: dict[str, Any] = {"target_sparsity": 0.6, "block_size": 8, "interval": 4, "trial_budget": None}
    return PruningConfig(**{**chosen, **changes})


def arguments(out: Path, **changes: Any) -> Any:
    chosen: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 128,
        "learning_rate": 3e-3,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return transformers.TrainingArguments(str(out), **{**chosen, **changes})


def trainer(
    out: Path,
    pruning: DynaPruneCallback,
    *,
    callbacks: tuple[Any, ...] = (),
    compute_metrics: Any = None,
    **changes: Any,
) -> Any:
    return transformers.Trainer(
        pruning.model,
        arguments(out, **changes),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        callbacks=[pruning, *callbacks],
        compute_metrics=compute_metrics,
    )


def masks(model: nn.Module) -> list[Tensor]:
    return [m.layout.slot_of_block.clone() for m in model.modules() if isinstance(m, BlockSparseLayer)]


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(VALIDATION.tokens).logits


def loaded_model(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)
