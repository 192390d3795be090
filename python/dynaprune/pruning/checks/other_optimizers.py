"""Optimizers that train the model and are not watched: what they do takes no part in the pruning."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.observe.hooks import inside_own_step

# Steps in a row of others, without one of a watched optimizer, after which they are no accident.
LASTING = 8


class OtherOptimizers:
    """Counts the steps that other optimizers take with pruned weights, and warns once they last. Those that
    train anything of the model are noted, for cuts.

    One hook on the steps of all optimizers serves every pruner, while there is one that is attached.

    Attributes:
        steps: taken so far, by the optimizer's type.
    """

    def __init__(self, structure: Structure, standing: Callable[[], str]) -> None:
        """Count from :meth:`watch` on.

        Args:
            standing: says where the pruning stands; empty where it is over, and nothing is lost.
        """
        self._structure, self._standing = structure, standing
        self.steps: Counter[str] = Counter()
        self._in_a_row = 0
        self._said = False

    def watch(self) -> None:
        """Learn of every optimizer's steps, until :meth:`unwatch`."""
        _WATCHING.add(self)
        if not _HOOK:
            _HOOK.append(register_optimizer_step_post_hook(_stepped))

    def unwatch(self) -> None:
        """Stop it, and let go of what says where pruning stands."""
        self._standing = str
        _WATCHING.discard(self)
        if not _WATCHING and _HOOK:
            _HOOK.pop().remove()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of any optimizer."""
        watched = self._structure.optimizers
        if any(optimizer is each for each in watched):
            self._in_a_row = 0
            return
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in params for p in self._structure.model.parameters()):
            self._structure.bystanders.add(optimizer)
        values = {id(weight) for _, weight in self._structure.trained}
        held = len(values & params)
        if not held:
            return
        self.steps[type(optimizer).__name__] += 1
        self._in_a_row += 1
        if self._in_a_row == LASTING and not self._said and (standing := self._standing()):
            self._said = True
            watched_types = ", ".join(type(each).__name__ for each in watched)
            warnings.warn(
                f"{type(optimizer).__name__} has taken {LASTING} steps with weights of {held} pruned layers, "
                f"and the pruner watches {watched_types} only: it stands at {standing}, and goes no "
                "further. Call pruner.detach(), and attach again with the optimizer that trains from here",
                RuntimeWarning,
                stacklevel=4,
            )


_WATCHING: WeakSet[OtherOptimizers] = WeakSet()
_HOOK: list[Any] = []


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or inside_own_step(optimizer):
        return
    for others in list(_WATCHING):
        others.stepped(optimizer)
