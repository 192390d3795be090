"""Gradients as the optimizer sees them, shown to a score."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.observe.score import Score
from dynaprune_kernels import BlockSaliency, block_saliency

# Observations in a row after which gradients that are not finite, or all zero, are no accident.
LASTING = 8


@dataclass
class Observed:
    """What observing did so far.

    Attributes:
        observations, discarded: steps shown to the score, and steps with gradients that are not finite.
        seconds: time spent.
        not_finite_in_a_row, zero_in_a_row: the latest observations of such gradients, without a scaler.
    """

    observations: int = 0
    discarded: int = 0
    seconds: float = 0.0
    not_finite_in_a_row: int = 0
    zero_in_a_row: int = 0

    @property
    def trouble(self) -> str:
        """What has been wrong with the gradients for :data:`LASTING` observations; empty where nothing is."""
        if self.not_finite_in_a_row >= LASTING:
            return "not finite"
        return "all zero" if self.zero_in_a_row >= LASTING else ""

    def note(self, optimizer: torch.optim.Optimizer, *, finite: bool, zero: bool) -> bool:
        """Count a step, and say whether to show it: its gradients are finite, and it is not skipped."""
        if getattr(optimizer, "found_inf", None) is None:
            self.not_finite_in_a_row = 0 if finite else self.not_finite_in_a_row + 1
            self.zero_in_a_row = self.zero_in_a_row + 1 if zero else 0
        shown = finite and not is_skipped(optimizer)
        self.observations += shown
        self.discarded += not shown
        return shown


def observe(
    layers: Iterable[LayerState], score: Score, optimizer: torch.optim.Optimizer, observed: Observed
) -> bool:
    """Show the score one step's gradients, and say whether: a step with any that is not finite is discarded.

    A fused optimizer under a GradScaler is called with scaled gradients, on skipped steps too: its
    ``grad_scale`` and ``found_inf`` are honoured.
    """
    started = time.perf_counter()
    scale = getattr(optimizer, "grad_scale", None)
    seen: list[tuple[LayerState, BlockSaliency]] = []
    for state in layers:
        values = state.layer.values
        if values.grad is not None:
            saliency = block_saliency(values, values.grad, state.layer.layout)
            seen.append((state, saliency if scale is None else _unscaled(saliency, scale)))
    if not seen:
        return False
    finite, zero = _finite_and_zero([saliency for _, saliency in seen])
    shown = observed.note(optimizer, finite=finite, zero=zero)
    if shown:
        for state, saliency in seen:
            score.observe(state, saliency)
            state.observations += 1
    observed.seconds += time.perf_counter() - started
    return shown


def observe_plain(
    weights: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, observed: Observed
) -> bool:
    """Whether one step's gradients of plain weights are usable: not where any is not finite."""
    started = time.perf_counter()
    grads = [weight.grad for _, weight in weights if weight.grad is not None]
    if not grads:
        return False
    wide = [torch.float64 if grad.dtype == torch.float64 else torch.float32 for grad in grads]
    norms = [torch.linalg.vector_norm(g.detach(), dtype=d) for g, d in zip(grads, wide, strict=True)]
    total = torch.stack([norm.to(norms[0].device, norms[0].dtype) for norm in norms])
    finite, zero = torch.stack([torch.isfinite(total).all(), (total == 0).all()]).tolist()
    shown = observed.note(optimizer, finite=finite, zero=zero)
    observed.seconds += time.perf_counter() - started
    return shown


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer under a GradScaler is about to skip its step. Syncs where there is one."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(torch.as_tensor(found_inf).sum() != 0)


def _unscaled(saliency: BlockSaliency, scale: Any) -> BlockSaliency:
    return BlockSaliency(
        saliency.weight_square,
        saliency.grad_square / scale / scale,
        saliency.weight_grad_abs / scale,
        saliency.weight_grad / scale,
        saliency.neuron_weight_grad / scale,
    )


def _finite_and_zero(saliencies: list[BlockSaliency]) -> tuple[bool, bool]:
    """Whether all sums are finite, and whether all gradients are zero: one host sync per device."""
    device = saliencies[0].grad_square.device
    squares = torch.stack([s.grad_square.sum().to(device) for s in saliencies])
    products = torch.stack([s.weight_grad_abs.sum().to(device) for s in saliencies])
    finite, zero = torch.stack([torch.isfinite(squares + products).all(), (squares == 0).all()]).tolist()
    return finite, zero


def refuse_without_gradients(
    weights: Sequence[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> None:
    """Raise RuntimeError where no prunable weight of the optimizer has a gradient at its step."""
    if weights and all(weight.grad is None for _, weight in weights):
        what_to_do = "call backward first, and zero_grad after the step"
        if not any(weight.requires_grad for _, weight in weights):
            what_to_do = (
                "they were frozen after attach (as PEFT freezes what it adds adapters to); call "
                "pruner.finalize() before that"
            )
        raise RuntimeError(
            f"{type(optimizer).__name__}.step: expected gradients on the prunable weights, got None on all "
            f"of {', '.join(name.rpartition('.')[0] for name, _ in weights[:4])}: {what_to_do}"
        )
