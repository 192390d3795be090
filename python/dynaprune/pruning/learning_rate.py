"""The learning rate of the blocks of a training that begins sparse, and the parameter groups that have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

LARGEST = 4.0
MARK = "sparse_multiplier"


def rate_multiplier(density: float, setting: str | float = "auto") -> float:
    """By how much the values of a layer that begins with ``density`` learn faster than a dense layer.

    A step of Adam changes each weight by about the learning rate. An output with a share ``density`` of its
    inputs then moves by that share of what it would: 1 / density makes up for it (Dey et al. 2024,
    "Sparse maximal update parameterization", arXiv:2405.15743). At most 4, which had the lowest mean loss of
    four rules on a language model and a network with batch norms (docs/matrix.md, A0).

    Args:
        setting: "auto" for this rule, rounded to two digits so that layers of nearly one density share a
            group, or the multiplier itself.

    Returns:
        1 for a layer that begins dense, whatever ``setting`` is.
    """
    if density >= 1:
        return 1.0
    return float(f"{min(1 / density, LARGEST):.2g}") if setting == "auto" else float(setting)


def split_group(group: dict[str, Any], multipliers: Mapping[int, float]) -> dict[float, dict[str, Any]]:
    """A parameter group as one for each multiplier (by ``id`` of a parameter) that it has, ascending.

    Each has the group's settings, the learning rate times the multiplier, and the weight decay divided by
    it. A decay that is taken off the weights (AdamW: rate times decay, and SGD's L2 as well) then stays as
    fast as it was, and L2 that goes through Adam's moments keeps its size beside that of an update. A group
    with nothing to multiply is returned itself, under 1.

    Raises:
        ValueError: a group without a learning rate to multiply.
    """
    params: dict[float, list[Any]] = {}
    for given in group["params"]:  # torch takes pairs of a name and a Parameter as well
        parameter = given[1] if isinstance(given, tuple) else given
        params.setdefault(multipliers.get(id(parameter), 1.0), []).append(given)
    if set(params) <= {1.0}:
        return {1.0: group}
    refuse_without_rate(group)
    return {multiplier: _scaled(group, params[multiplier], multiplier) for multiplier in sorted(params)}


def refuse_without_rate(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a parameter group has no learning rate that could be multiplied."""
    if group.get("lr") is None:
        raise ValueError(
            "expected a learning rate in the parameter group of block-sparse layers, to multiply it, got "
            "none: set PruningConfig(sparse_learning_rate=1.0) for an optimizer that finds its own"
        )


def _scaled(group: Mapping[str, Any], params: list[Any], multiplier: float) -> dict[str, Any]:
    part = {**group, "params": params}
    if multiplier != 1:
        part["lr"] = group["lr"] * multiplier
        if group.get("weight_decay"):
            part["weight_decay"] = group["weight_decay"] / multiplier
    return part


def marked_groups(
    groups: Iterable[Mapping[str, Any]], multipliers: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Every group split; the parts of one that has something to multiply say by what, under ``MARK``."""
    found: list[dict[str, Any]] = []
    for group in groups:
        params = group["params"]
        whole = {**group, "params": [params] if isinstance(params, Tensor) else list(params)}
        parts = split_group(whole, multipliers)
        marked = set(parts) != {1.0}
        found += [{**part, MARK: multiplier} if marked else part for multiplier, part in parts.items()]
    return found
