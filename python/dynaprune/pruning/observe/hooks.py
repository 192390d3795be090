"""Hooks on ``optimizer.step``: when gradients are ready, and when all that train the layers have stepped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch


class StepHooks:
    """Calls ``before(optimizer)`` when gradients are ready, and ``completed()`` when all have stepped.

    ``before`` runs right before the update; with ``step(closure)`` after the closure, which is where backward
    is. During the capture of a CUDA graph nothing runs.

    Args:
        refuse_in_backward: raise where a step is inside backward; otherwise nothing runs there.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        before: Callable[[torch.optim.Optimizer], None],
        completed: Callable[[], None] | None = None,
        *,
        refuse_in_backward: bool = True,
    ) -> None:
        self._before, self._completed, self._refuses = before, completed, refuse_in_backward
        self._waiting_for, self._stepped = len(optimizers), set[int]()
        self._handles: list[Any] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre))
            self._handles.append(optimizer.register_step_post_hook(self._post))

    def _pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_capturing() or inside_own_step(optimizer):
            return None
        if in_backward():
            if not self._refuses:
                return None
            raise RuntimeError(
                f"{type(optimizer).__name__}.step was called inside backward: pruning changes shapes after "
                "the step, which must not happen there; step after backward"
            )
        return after_closure(optimizer, args, kwargs, lambda: self._before(optimizer))

    def _post(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._completed is None or is_capturing() or inside_own_step(optimizer):
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == self._waiting_for:
            self._stepped.clear()
            self._completed()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def after_closure(
    optimizer: torch.optim.Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ready: Callable[[], None],
    begin: Callable[[], None] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call ``ready()`` when gradients are there: now, or with ``step(closure)`` after each of its calls.

    Args:
        args, kwargs: of the step's pre-hook.
        begin: called before each call of the closure.

    Returns:
        What the pre-hook has to return.
    """
    # `step` is wrapped as a function of the class, so args[0] is the optimizer itself.
    position = 1 if args and args[0] is optimizer else 0
    closure = args[position] if len(args) > position else kwargs.get("closure")
    if closure is None:
        ready()
        return None

    def watched() -> Any:
        if begin is not None:
            begin()
        loss = closure()
        ready()
        return loss

    if len(args) > position:
        return (*args[:position], watched, *args[position + 1 :]), kwargs
    return args, {**kwargs, "closure": watched}


def inside_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook runs for a step that another step of the same optimizer called.

    A subclass whose ``step`` calls its base's has both wrapped once the base class was used by itself: torch
    then calls every hook twice. The frames are looked at, since a step that raised never comes to its end.
    """
    kind = type(optimizer)
    if sum(hasattr(each.__dict__.get("step"), "hooked") for each in kind.__mro__) < 2:
        return False
    wrapper, found = kind.step.__code__, 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found > 1


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which case hooks must not touch anything."""
    cuda = sys.modules.get("torch.cuda")
    return cuda is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
