"""What the report says of a training that more than one process made, or of arms on different processors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

__all__ = ["marks"]

# Where one of these differs, a training need not take the course bit for bit that it would have taken.
_MARKED = (
    ("dynaprune", "versions", "dynaprune"),
    ("commit", "commit"),
    ("torch", "versions", "torch"),
    ("processor", "cpu"),
    ("instruction set", "cpu_capability"),
    ("CPU kernels", "cpu_kernels"),
    ("threads", "threads"),
    ("device", "device"),
)


def marks(arms: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """Sentences on the parts that the arms were trained in, for people; none where each arm is of one part
    and both are of one processor."""
    found: list[str] = []
    last: dict[str, dict[str, Any]] = {}
    for arm, result in arms.items():
        parts = (result or {}).get("parts") or []
        for before, after in itertools.pairwise(parts):
            changed = _changes(before["environment"], after["environment"])
            if changed:
                found.append(
                    f"The {arm} arm went on after step {after['steps_before']:,} with another "
                    f"{' and another '.join(changed)}: it need not be bit for bit what one machine gives."
                )
        if parts:
            last[arm] = parts[-1]["environment"]
    processors = {arm: environment.get("cpu") for arm, environment in last.items()}
    if len(set(processors.values())) > 1:
        told = ", ".join(f"{arm} on {cpu}" for arm, cpu in processors.items())
        found.append(f"The arms were trained on different processors ({told}): do not compare their times.")
    return found


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    values = {name: (_at(before, way), _at(after, way)) for name, *way in _MARKED}
    return [f"{name} ({a}, then {b})" for name, (a, b) in values.items() if a != b]


def _at(environment: Mapping[str, Any], way: list[str]) -> Any:
    value: Any = environment
    for key in way:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
