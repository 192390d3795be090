"""What a family is: it finds modules that keep counts of their own beside the widths of their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from dynaprune.families.attention import find_attentions

_ATTRIBUTE = "_families"


class Counts(Protocol):
    """One module that keeps counts."""

    def set_counts(self, model: nn.Module, assign: Callable[[Any, str, Any], None] = setattr) -> None:
        """Bring the module's counts in line with the widths that its layers have now.

        Args:
            assign: ``assign(module, attribute, value)``; what it assigns may be taken back.
        """


@runtime_checkable
class Family(Protocol):
    """Finds the modules of one family in a model."""

    def find(self, model: nn.Module) -> Sequence[Counts]:
        """Every module of the family, as its layers are wide now."""


def check_families(families: Any) -> tuple[Family, ...]:
    """``families`` as a tuple; TypeError for what has no ``find(model)``."""
    for family in families:
        if isinstance(family, type) or not isinstance(family, Family):
            raise TypeError(f"expected families as objects with find(model), got {family!r}")
    return tuple(families)


def note_families(model: nn.Module, families: Sequence[Family]) -> None:
    """Let ``model``, and copies that are made of it, say that it belongs to ``families``."""
    if families:
        setattr(model, _ATTRIBUTE, tuple(families))


def counts_in(model: nn.Module) -> list[Counts]:
    """Modules that keep counts, of the built-in families and of those that were noted."""
    found: list[Counts] = list(find_attentions(model))
    for family in getattr(model, _ATTRIBUTE, ()):
        found.extend(family.find(model))
    return found
