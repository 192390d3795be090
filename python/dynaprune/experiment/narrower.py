"""The narrower network whose FLOPs are nearest to a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynaprune.experiment.tasks import Task

__all__ = ["nearest_width"]


def nearest_width(
    task: Task,
    kind: str,
    options: Mapping[str, Any],
    target: float,
    flops: Callable[[dict[str, Any]], float],
) -> tuple[dict[str, Any], float]:
    """The task's options whose network has nearly ``target`` FLOPs, and how many it has.

    Args:
        kind: a key of ``task.narrower``: in which way the network gets narrower.
        flops: of a training with the options that it gets.

    Raises:
        ValueError: a task that has no such networks, or none of so few FLOPs.
    """
    if kind not in task.narrower:
        known = ", ".join(task.narrower) or "none"
        raise ValueError(f"{task.name} has no networks for the control {kind}; those that it has: {known}")
    steps = task.narrower[kind](options)
    counted: dict[int, float] = {}

    def at(number: int) -> float:
        if number not in counted:
            counted[number] = flops(steps[number][0])
        return counted[number]

    if at(0) > 1.1 * target:
        raise ValueError(
            f"expected a budget of at least {at(0):.4g} FLOPs for the control {kind}, what the narrowest "
            f"network of {task.name} takes, got {target:.4g}: lower the sparsity"
        )
    few, many = 0, len(steps) - 1
    while few < many:
        middle = (few + many) // 2
        few, many = (middle + 1, many) if at(middle) < target else (few, middle)
    near = [*steps[few], *(steps[few - 1] if few else ())]
    found = [(each, flops(each)) for each in near]
    return min(found, key=lambda pair: abs(pair[1] - target))
