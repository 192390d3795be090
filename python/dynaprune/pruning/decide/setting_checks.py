"""Checks of single settings: each says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


def number(name: str, value: Any) -> None:
    """Raise where ``value`` is no finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite {name}, got {value}")


def at_least_zero(name: str, value: Any) -> None:
    """Raise where ``value`` is no finite number from 0 up."""
    number(name, value)
    if value < 0:
        raise ValueError(f"expected {name} of at least 0, got {value}")


def fraction(name: str, value: Any, *, zero: bool = False, one: bool = False) -> None:
    """Raise where ``value`` is not between 0 and 1; the ends count where they are allowed."""
    number(name, value)
    if not ((value > 0 or (zero and value == 0)) and (value < 1 or (one and value == 1))):
        raise ValueError(f"expected {name} in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value}")


def count(name: str, value: Any, *, optional: bool = False, least: int = 1) -> None:
    """Raise where ``value`` is no whole number of at least ``least``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {name} to be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}")


def strings(name: str, value: Any) -> None:
    """Raise where ``value`` is no sequence of strings."""
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(v, str) for v in value)
    ):
        raise TypeError(f"expected {name} as a sequence of strings, got {value!r}")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise where ``value`` is not among ``known``."""
    if value not in known:
        raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
