"""Masked-language modelling on the task's own training text, before the classifier is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment.model_state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dynaprune.experiment.random_states import random_states, set_random_states
from dynaprune.experiment.steps import make_schedule, now
from dynaprune.experiment.tasks.text import Texts
from dynaprune.nn.to_device import to_device

if TYPE_CHECKING:
    from dynaprune.experiment.run_config import RunConfig
    from dynaprune.experiment.state_files import StateFiles

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


@dataclass
class _Pretraining:
    """A pretraining under way. Of the present epoch, before which ``order`` had the state ``began``,
    ``batches`` are done, with losses of the sum ``total``."""

    head: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    mask: Any
    order: torch.Generator
    device: torch.device
    total: torch.Tensor
    began: torch.Tensor
    batches: int = 0
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {
            **plain,
            "head": model_state(self.head),
            "optimizer": optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "mask": self.mask.generator.get_state(),
            "total": self.total,
            "began": self.began,
            "random": random_states(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved `state_dict`."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        load_model_state(self.head, state["head"])
        load_optimizer_state(self.optimizer, self.head, state["optimizer"])
        self.schedule.load_state_dict(dict(state["schedule"]))
        self.mask.generator.set_state(state["mask"].clone())
        self.total = state["total"].to(self.device, copy=True)
        self.began = state["began"].clone()
        set_random_states(state["random"], self.device)

    def epoch(
        self, blocks: np.ndarray, special: np.ndarray, batch_size: int, done: Callable[[], None]
    ) -> None:
        """What is left of an epoch; ``done`` is called after every step."""
        self.order.set_state(self.began)
        parts = torch.randperm(len(blocks), generator=self.order).split(batch_size)
        for rows in parts[self.batches :]:
            batch = self.mask(
                [{"input_ids": blocks[i], "special_tokens_mask": special[i]} for i in rows.tolist()]
            )
            self.optimizer.zero_grad(set_to_none=True)
            loss = masked_language_loss(self.head, to_device(dict(batch), self.device))
            loss.backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.schedule.step()
            self.total += loss.detach()
            self.batches, self.steps = self.batches + 1, self.steps + 1
            done()
        self.losses.append(float(self.total) / len(parts))
        self.total, self.began, self.batches = torch.zeros_like(self.total), self.order.get_state(), 0


_PLAIN = ("batches", "steps", "seconds", "losses")


def _begin(model: Any, data: Any, config: RunConfig, device: torch.device, steps: int) -> _Pretraining:
    from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

    seed = config.model_seed
    torch.manual_seed(seed)
    head: Any = BertForMaskedLM(model.config)
    head.bert = model.bert
    head.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
    head.to(device).train()
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    mask = DataCollatorForLanguageModeling(data.tokenizer, mlm_probability=MASKED, seed=seed)
    mask.create_rng()
    optimizer = torch.optim.AdamW(
        [p for p in head.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    rule = replace(config, schedule="linear", warmup_steps=round(WARMUP * steps))
    order = torch.Generator().manual_seed(seed)
    schedule = make_schedule(optimizer, rule, steps)
    total = torch.zeros((), device=device)
    return _Pretraining(head, optimizer, schedule, mask, order, device, total, order.get_state())


def pretrain(
    model: Any, data: Any, config: RunConfig, device: torch.device, states: StateFiles | None = None
) -> dict[str, Any]:
    """Train the encoder ``model.bert`` for ``config.options["pretrain_epochs"]`` passes over ``data.train``.

    AdamW, a learning rate that rises over 6% of the steps to 5e-4 and falls to zero, no dropout (so that it
    does not matter which arm's model is given). The head that predicts tokens is dropped afterwards; its
    output weights are the encoder's word embeddings.

    It goes on from the newest of ``states``, and writes one after every epoch and when one is due.

    Returns:
        Steps, blocks and seconds, and the mean loss in nats of the first and of the last epoch.

    Raises:
        ValueError: texts that fill no block, a state of another training, or none that is whole."""
    epochs = int(config.options["pretrain_epochs"])
    blocks = blocks_of_text(data.train)
    special = np.isin(blocks, (data.train.start, data.train.end)).astype(np.int64)
    steps = epochs * -(-len(blocks) // config.batch_size)
    begun = now(device)
    under_way = _begin(model, data, config, device, steps)
    if states is not None and (saved := states.newest()) is not None:
        under_way.load_state_dict(saved.state)
        begun = now(device) - under_way.seconds

    def write() -> None:
        nonlocal begun
        if states is not None:
            under_way.seconds = now(device) - begun
            states.write(under_way.steps, under_way.state_dict())
            begun = now(device) - under_way.seconds

    def write_if_due() -> None:
        if states is not None and states.due():
            write()

    for epoch in range(len(under_way.losses) + 1, epochs + 1):
        under_way.epoch(blocks, special, config.batch_size, write_if_due)
        loss = under_way.losses[-1]
        print(f"pretraining: epoch {epoch} of {epochs}, loss {loss:.3f}", file=sys.stderr, flush=True)
        write()
    model.zero_grad(set_to_none=True)
    model.train()
    return {
        "pretrain_steps": steps,
        "pretrain_blocks": len(blocks),
        "pretrain_loss_first": under_way.losses[0],
        "pretrain_loss_last": under_way.losses[-1],
        "pretrain_seconds": now(device) - begun,
    }
