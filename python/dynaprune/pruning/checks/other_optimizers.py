"""Optimizers that train pruned weights and are not watched: what they do takes no part in the pruning."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from dynaprune.pruning.pruner import Pruner

# Steps in a row of others, without one of a watched optimizer, after which they are no accident.
LASTING = 8


class OtherOptimizers:
    """Counts the steps that other optimizers take with weights of one pruner, and warns once they last.

    One hook on the steps of all optimizers serves every pruner, while there is one that is attached.

    Attributes:
        steps: taken so far, by the optimizer's type.
    """

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()
        self._in_a_row = 0
        self._said = False

    def stepped(self, pruner: Pruner, optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of any optimizer."""
        if any(optimizer is watched for watched in pruner.optimizers):
            self._in_a_row = 0
            return
        values = {id(layer.values) for layer in pruner.layers.values()}
        held = sum(id(p) in values for group in optimizer.param_groups for p in group["params"])
        if not held:
            return
        self.steps[type(optimizer).__name__] += 1
        self._in_a_row += 1
        if self._in_a_row == LASTING and not self._said and not pruner.nothing_left():
            self._said = True
            watched_types = ", ".join(type(each).__name__ for each in pruner.optimizers)
            warnings.warn(
                f"{type(optimizer).__name__} has taken {LASTING} steps with weights of {held} pruned layers, "
                f"and the pruner watches {watched_types} only: it stands at step {pruner.steps} of "
                f"{pruner.config.total_steps} with {pruner.sparsity:.1%} of the weights gone, and goes no "
                "further. Call pruner.detach(), and attach again with the optimizer that trains from here",
                RuntimeWarning,
                stacklevel=4,
            )


_ATTACHED: WeakSet[Pruner] = WeakSet()
_HOOK: list[Any] = []


def watch_other_optimizers(pruner: Pruner) -> None:
    """Tell ``pruner.other_optimizers`` of every optimizer's steps, until :func:`unwatch_other_optimizers`."""
    _ATTACHED.add(pruner)
    if not _HOOK:
        _HOOK.append(register_optimizer_step_post_hook(_stepped))


def unwatch_other_optimizers(pruner: Pruner) -> None:
    """Stop it."""
    _ATTACHED.discard(pruner)
    if not _ATTACHED and _HOOK:
        _HOOK.pop().remove()


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for pruner in list(_ATTACHED):
        pruner.other_optimizers.stepped(pruner, optimizer)
