"""One loss per sample from a Hugging Face model, as a trial needs it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_PER_SAMPLE = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)
_PER_TOKEN = ("ForTokenClassification", "ForMaskedLM", "ForCausalLM", "ForConditionalGeneration")
_IGNORED = -100


def per_sample_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Losses ``[b]`` of ``model(**batch)``, and the classes ``[b]`` where each sample has one.

    Knows models whose ``loss_type`` is a classification of whole samples (cross entropy; squared error for
    one output; binary cross entropy for several labels) or of tokens (cross entropy, averaged per sample over
    tokens not labelled -100; of the next token for causal models).

    Raises:
        ValueError: another kind of model, or a batch without labels.
    """
    kind = getattr(model, "loss_type", None)
    labels = batch.get("labels")
    if kind not in (*_PER_SAMPLE, *_PER_TOKEN) or labels is None:
        raise ValueError(
            f"expected labels and a model with a loss among {', '.join((*_PER_SAMPLE, *_PER_TOKEN))}, got "
            f"{type(model).__name__} with {kind} {'and' if labels is not None else 'without'} labels: give "
            "loss=f, f(model, batch) -> one loss per sample [b], or trial=False to prune untested"
        )
    logits = model(**batch).logits.float()
    if kind in _PER_TOKEN:
        return _token_losses(logits, labels, shifted=_predicts_next(model, kind)), None
    if labels.is_floating_point() and labels.shape == logits.shape and logits.shape[1] > 1:
        regression = getattr(getattr(model, "config", None), "problem_type", None) == "regression"
        losses = F.mse_loss if regression else F.binary_cross_entropy_with_logits
        return losses(logits, labels.float(), reduction="none").mean(1), None
    if labels.is_floating_point() or logits.shape[1] == 1:
        return F.mse_loss(logits.view(-1), labels.float().view(-1), reduction="none"), None
    return F.cross_entropy(logits, labels.view(-1), reduction="none"), labels.view(-1)


def _predicts_next(model: nn.Module, kind: str) -> bool:
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return kind in ("ForCausalLM", "ForConditionalGeneration") and not encoder_decoder


def _token_losses(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=_IGNORED)
    counted = labels != _IGNORED
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
