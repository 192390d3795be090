"""Masked-language modelling on the task's own training text, before the classifier is trained."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment.steps import make_schedule
from dynaprune.experiment.tasks.text import Texts
from dynaprune.nn.to_device import to_device

if TYPE_CHECKING:
    from dynaprune.experiment.run_config import RunConfig

__all__ = ["blocks_of_text", "masked_language_loss", "pretrain"]

MASKED = 0.15
LEARNING_RATE, WEIGHT_DECAY, WARMUP, MAX_GRAD_NORM = 5e-4, 0.01, 0.06, 1.0
_NOT_MASKED = -100


def blocks_of_text(texts: Texts) -> np.ndarray:
    """The whole texts one after the other, ``[SEP]`` behind each, cut into blocks of the data set's length
    that start with ``[CLS]``: int64 ``[blocks, length]``. What does not fill a block is left out.

    ValueError where the texts do not fill one."""
    stream = np.insert(texts.flat, texts.ends, texts.end).astype(np.int64)
    width = texts.max_length - 1
    count = len(stream) // width
    if count == 0:
        raise ValueError(f"expected at least {width} tokens of text to pretrain on, got {len(stream)}")
    blocks = stream[: count * width].reshape(count, width)
    return np.concatenate([np.full((count, 1), texts.start), blocks], axis=1)


def masked_language_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy at the masked positions, as ``BertForMaskedLM`` has it; the vocabulary's logits are
    computed there only."""
    hidden = model.bert(input_ids=batch["input_ids"]).last_hidden_state
    chosen = batch["labels"] != _NOT_MASKED
    return nn.functional.cross_entropy(model.cls(hidden[chosen]), batch["labels"][chosen])


def pretrain(model: Any, data: Any, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Train the encoder ``model.bert`` for ``config.options["pretrain_epochs"]`` passes over ``data.train``.

    AdamW, a learning rate that rises over 6% of the steps to 5e-4 and falls to zero, no dropout (so that it
    does not matter which arm's model is given). The head that predicts tokens is dropped afterwards; its
    output weights are the encoder's word embeddings.

    Returns:
        Steps and blocks, and the mean loss in nats of the first and of the last epoch."""
    from dataclasses import replace

    from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

    epochs, seed = int(config.options["pretrain_epochs"]), config.model_seed
    torch.manual_seed(seed)
    head: Any = BertForMaskedLM(model.config)
    head.bert = model.bert
    head.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
    head.to(device).train()
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    mask = DataCollatorForLanguageModeling(data.tokenizer, mlm_probability=MASKED, seed=seed)
    blocks = blocks_of_text(data.train)
    special = np.isin(blocks, (data.train.start, data.train.end)).astype(np.int64)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(blocks) // config.batch_size)
    optimizer = torch.optim.AdamW(
        [p for p in head.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    rule = replace(config, schedule="linear", warmup_steps=round(WARMUP * steps))
    schedule = make_schedule(optimizer, rule, steps)
    losses: list[float] = []
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), device=device)
        parts = torch.randperm(len(blocks), generator=order).split(config.batch_size)
        for rows in parts:
            samples = [{"input_ids": blocks[i], "special_tokens_mask": special[i]} for i in rows.tolist()]
            optimizer.zero_grad(set_to_none=True)
            loss = masked_language_loss(head, to_device(dict(mask(samples)), device))
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(float(total) / len(parts))
        print(f"pretraining: epoch {epoch} of {epochs}, loss {losses[-1]:.3f}", file=sys.stderr, flush=True)
    model.zero_grad(set_to_none=True)
    model.train()
    return {
        "pretrain_steps": steps,
        "pretrain_blocks": len(blocks),
        "pretrain_loss_first": losses[0],
        "pretrain_loss_last": losses[-1],
    }
