"""Steps at which the optimizer sees block values in parameter groups of their own, with their rate."""

from __future__ import annotations

from typing import Any

import torch

from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.learning_rate import MARK, split_group
from dynaprune.pruning.observe.hooks import after_closure

Group = dict[str, Any]


class ScaledSteps:
    """For the time of an update, ``optimizer.param_groups`` are split by the layers' multipliers.

    Outside of it, in the closure of a ``step(closure)`` too, they are what the user, the Trainer or a
    checkpoint made of them: a scheduler, made before or after, sets their rates as ever, and each multiplier
    is of what it has set. Groups from ``Prepared.parameter_groups`` have their rates already, and stay.
    """

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._during: dict[torch.optim.Optimizer, tuple[list[Group], list[tuple[Group, float, Group, Group]]]]
        self._during = {}
        self._checked: set[torch.optim.Optimizer] = set()
        self._handles: list[Any] = []
        if all(state.rate == 1 for state in structure.layers.values()):
            return
        for optimizer in structure.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
            # After an update that an error ended nothing else makes the groups whole.
            self._handles.append(optimizer.register_state_dict_pre_hook(self._make_whole))
            self._handles.append(optimizer.register_load_state_dict_pre_hook(self._make_whole))

    def remove(self) -> None:
        """Take the hooks off: every layer learns at its group's rate."""
        for optimizer in list(self._during):
            self._restore(optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _split_groups(self, optimizer: torch.optim.Optimizer) -> list[tuple[Group, dict[float, Group]]]:
        multipliers = {id(state.layer.values): state.rate for state in self._structure.layers.values()}
        return [
            (group, {1.0: group} if MARK in group else split_group(group, multipliers))
            for group in optimizer.param_groups
        ]

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._after(optimizer)  # of a step that an error ended, or that is inside another one's
        return after_closure(
            optimizer, args, kwargs, lambda: self._split(optimizer), lambda: self._after(optimizer)
        )

    def _split(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer not in self._checked and _rates_differ(optimizer):
            self._checked.add(optimizer)
        split = self._split_groups(optimizer)
        parts = [(g, m, part, dict(part)) for g, found in split for m, part in found.items()]
        self._during[optimizer] = optimizer.param_groups, parts
        optimizer.param_groups = [part for _, _, part, _ in parts]

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, multiplier, part, given in self._restore(optimizer):
            for key in part.keys() - {"params"}:
                if part is group or part[key] is given.get(key):
                    continue
                if multiplier == 1:
                    group[key] = part[key]
                elif key not in given or part[key] != given[key]:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} keeps numbers of its own in its parameter groups "
                        f"({key}): give it groups of which it can keep them for the whole training "
                        "(dynaprune.prepare, then prepared.parameter_groups), or set "
                        "PruningConfig(sparse_learning_rate=1.0)"
                    )

    def _make_whole(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._restore(optimizer)

    def _restore(self, optimizer: torch.optim.Optimizer) -> list[tuple[Group, float, Group, Group]]:
        """Put the groups back; what they were during the step."""
        if optimizer not in self._during:
            return []
        optimizer.param_groups, parts = self._during.pop(optimizer)
        return parts


def _rates_differ(optimizer: torch.optim.Optimizer) -> bool:
    """Whether groups that were marked have rates, and these are not all the same.

    Raises:
        RuntimeError: they are.
    """
    base, seen = 0.0, True
    for group in optimizer.param_groups:
        if (multiplier := group.get(MARK)) is None:
            continue
        rate = float(group["lr"])
        if multiplier == 1:
            base = rate
        elif rate == base != 0:
            raise RuntimeError(
                f"the learning rate of the sparse layers is no longer {multiplier} times that of the others: "
                "a scheduler has given all parameter groups the same one (OneCycleLR or CyclicLR with one "
                "number). Give it one for each: max_lr=[group['lr'] for group in optimizer.param_groups]"
            )
        seen &= rate != 0
    return seen
