"""Optimizer surgery: state of a weight's shape moves, shrinks and is zeroed with the weight's blocks."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Optimizers = Sequence[torch.optim.Optimizer]
_DRY_STEPS = 2
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def sliced_state(
    optimizers: Optimizers, parameter: nn.Parameter
) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Every optimizer tensor of the parameter's shape, with the dict and key that hold it."""
    for optimizer in optimizers:
        state = optimizer.state.get(parameter) or {}
        for key in list(state):
            tensor = state[key]
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                yield state, key, tensor


def rewrite_state(
    optimizers: Optimizers, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]
) -> None:
    """Put the optimizer tensors of the parameter's shape through ``change``, before the parameter changes."""
    for state, key, tensor in sliced_state(optimizers, parameter):
        state[key] = change(tensor)


def zero_slots(optimizers: Optimizers, parameter: nn.Parameter, slots: Tensor) -> None:
    """Zero weight, gradient and optimizer state of ``slots`` (bool ``[capacity]``) in place; no host sync."""
    where = slots.view(-1, 1, 1)
    with torch.no_grad():
        parameter.masked_fill_(where, 0)
        if parameter.grad is not None:
            parameter.grad.masked_fill_(where, 0)
        for _, _, tensor in sliced_state(optimizers, parameter):
            tensor.masked_fill_(where, 0)


def seed_slots(optimizers: Optimizers, parameter: nn.Parameter, live: Tensor, new: Tensor) -> None:
    """Start ``new`` slots: zeros, but second moments at the mean of the ``live`` slots.

    Args:
        live, new: bool ``[capacity]``.
    """
    with torch.no_grad():
        parameter.masked_fill_(new.view(-1, 1, 1), 0)
        if parameter.grad is not None:
            parameter.grad.masked_fill_(new.view(-1, 1, 1), 0)
        for state, key, tensor in sliced_state(optimizers, parameter):
            state[key] = seed_state(key, tensor, live, new)


def check_state_shapes(optimizers: Optimizers, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise RuntimeError where an optimizer holds state of another shape than its parameter.

    ``Optimizer.load_state_dict`` takes such state without a word.
    """
    for name, parameter in parameters:
        for optimizer in optimizers:
            for key, value in (optimizer.state.get(parameter) or {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} holds {key} of shape {tuple(value.shape)} for {name}, "
                        f"expected {tuple(parameter.shape)}: a state dict of another structure was loaded; "
                        "load the model's, the optimizer's and the pruner's state of the same moment"
                    )


def refuse_unsliceable(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], like: Tensor, shape: tuple[int, ...]
) -> None:
    """Find out by dry steps on a parameter of that shape whether this optimizer's state can be sliced.

    The optimizer itself, its state and every random state stay as they are.

    Args:
        group: the param group whose settings hold.
        like: tensor of the dtype and device to try.
        shape: of three blocks, ``(3, bi, bo)``, or of a small dense weight.

    Raises:
        ValueError: naming the optimizer and the state that is not shaped like the weight, or the error of its
            step.
    """
    kind = type(optimizer).__name__
    parameter = nn.Parameter(torch.full(shape, 0.5, dtype=like.dtype, device=like.device))
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    twin.param_groups = [{**group, "params": [parameter]}]
    twin.state = defaultdict(dict)
    if callable(to_training := getattr(twin, "train", None)):
        to_training()  # schedule-free optimizers step in training mode only
    devices = [like.device.index or 0] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for _ in range(_DRY_STEPS):
            parameter.grad = torch.full_like(parameter, 1e-3)
            try:
                try:
                    twin.step()
                except KeyError:
                    if not (made := _made_with_the_optimizer(optimizer, group, parameter)):
                        raise
                    twin.state[parameter] = made
                    twin.step()
            except Exception as error:
                if "closure" in str(error).lower():
                    raise ValueError(
                        f"cannot attach to {kind}: its step runs the closure itself, as sharpness-aware "
                        "minimisation does, and a trial step has none; attach to the optimizer that it wraps "
                        f"(optimizer.base_optimizer, often), got {type(error).__name__}: {error}"
                    ) from error
                raise ValueError(
                    f"cannot attach to {kind}: its step fails on a weight of shape {shape} "
                    f"({type(error).__name__}: {error})"
                ) from error
    for key, value in twin.state[parameter].items():
        shapes = [tuple(t.shape) for t in _tensors(value) if t.numel() > 1]
        if shapes and (not isinstance(value, Tensor) or value.shape != parameter.shape):
            raise ValueError(
                f"cannot attach to {kind}: its state {key!r} has shapes {shapes} for a weight of shape "
                f"{tuple(parameter.shape)}, and cannot be sliced with it"
            )


def _made_with_the_optimizer(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor
) -> dict[str, Any]:
    """The state of a parameter of another shape, for optimizers that make it in their constructor and expect
    it there (Adagrad of torch 2.10); empty where the group has none."""
    for other in group["params"]:
        if found := optimizer.state.get(other):
            return {
                key: torch.full_like(parameter, value.flatten()[0].item())
                if isinstance(value, Tensor) and value.shape == other.shape
                else copy.deepcopy(value)
                for key, value in found.items()
            }
    return {}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def seed_state(key: str, state: Tensor, live_slots: Tensor, new_slots: Tensor) -> Tensor:
    """Optimizer state with the slots of blocks that return set to where they start. No host sync.

    Second moments start at the layer's live mean: at a late ``step`` Adam's bias correction is gone, and a
    zero second moment made updates of up to ``(1 - beta1) / sqrt(1 - beta2)`` = 3.2 learning rates, 6.5
    measured. All else starts at 0.

    Args:
        key: the optimizer's name of the state, such as ``exp_avg_sq``.
        state: ``[capacity, bi, bo]``; slots that are neither live nor new may hold anything.
        live_slots: bool ``[capacity]``, slots of blocks that lived before; slots that are also new do not
        count.
        new_slots: bool ``[capacity]``.

    Returns:
        A new tensor like ``state``.

    Raises:
        TypeError, ValueError: masks of another dtype or length.
    """
    for mask in (live_slots, new_slots):
        if mask.dtype != torch.bool:
            raise TypeError(f"expected bool slots, got {mask.dtype}")
        if mask.shape != state.shape[:1]:
            raise ValueError(f"expected slots of shape {tuple(state.shape[:1])}, got {tuple(mask.shape)}")
    start = torch.zeros((), dtype=state.dtype, device=state.device)
    if key in SECOND_MOMENTS:
        counted = (live_slots & ~new_slots).view(-1, *(1,) * (state.dim() - 1))
        total = torch.where(counted, state, 0).sum(dtype=torch.float64)
        elements = counted.sum() * math.prod(state.shape[1:])
        start = (total / elements.clamp(min=1)).to(state.dtype)
    return torch.where(new_slots.view(-1, *(1,) * (state.dim() - 1)), start, state)
