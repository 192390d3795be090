"""Pruning whole neurons out of plain layers: nothing is swapped, and no kernel of ours is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynaprune.nn.optimizer_state import refuse_unsliceable
from dynaprune.pruning.checks import refusals
from dynaprune.pruning.checks.one_process import take_off_averaging_
from dynaprune.pruning.checks.reachable_neurons import no_neurons_reason
from dynaprune.pruning.decide.trial import Trial
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.pruner import Pruner
from dynaprune.pruning.whole_neurons import know_neurons

_NOT_HELD = "no optimizer given holds its weight"
_SMALL = (3, 2)


def attach_plain(prepared: Prepared, optimizers: list[torch.optim.Optimizer], trial: Trial | None) -> Pruner:
    """Watch ``optimizers`` train the model, to make its plain layers narrower.

    Raises:
        TypeError, ValueError: an optimizer that cannot train them, or a model none of whose neurons can go
            (without example inputs that shows at the first event).
    """
    model, exempt = prepared.model, dict(prepared.exempt)
    makers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, prepared.config.layer_types) and name not in exempt
    }
    weights = [(name, layer.weight) for name, layer in makers.items()]
    held = refusals.refuse_without_prunable_weights(weights, optimizers)
    refusals.refuse_in_backward(weights)
    _refuse_unsliceable([weight for _, weight in weights], optimizers)
    exempt.update({name: _NOT_HELD for name, weight in weights if id(weight) not in held})
    take_off_averaging_(model)
    plain = {name: layer for name, layer in makers.items() if name not in exempt}
    pruner = Pruner(prepared, optimizers, {}, exempt, trial, plain)
    known = know_neurons_at_attach(pruner)
    if known and (reason := no_neurons_reason(pruner.structure, pruner.tracer.refused)):
        pruner.detach()
        raise ValueError(reason)
    return pruner


def know_neurons_at_attach(pruner: Pruner) -> bool:
    """Find the neurons that may go before training, and say whether: not without example inputs."""
    if pruner.tracer.example is None or know_neurons(pruner.structure, pruner.tracer) is None:
        return False
    pruner.ledger.history.clear()
    pruner.ledger.note_sizes(0, pruner.structure)
    return True


def _refuse_unsliceable(weights: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError where an optimizer's state of a dense weight has another shape than the weight."""
    ids = {id(weight) for weight in weights}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            mine = {p.dim(): p for p in group["params"] if id(p) in ids}
            for like in mine.values():
                refuse_unsliceable(optimizer, group, like, (*_SMALL, *like.shape[2:]))
