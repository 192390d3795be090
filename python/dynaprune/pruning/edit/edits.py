"""Structural changes as values: what goes, what comes back, what is cut out, and what is compacted.

A policy decides them and :func:`~dynaprune.pruning.edit.apply.apply` carries them out. They can be printed,
counted and compared by what they name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs

PASSED, FORCED, UNTESTED = "passed", "forced", "untested"
REASONS = (PASSED, FORCED, UNTESTED)


@dataclass(frozen=True, eq=False)
class Release:
    """Live blocks die: weight, gradient and optimizer state become zeros, and their slots are free.

    Args:
        masks: bool ``[rows, columns]`` by layer, true where a live block goes.
        why: they passed a trial ("passed"), failed one and go to reach the target ("forced"), or were not
            tried ("untested").
    """

    masks: Mapping[str, Tensor]
    why: str = UNTESTED

    def __str__(self) -> str:
        return f"release {_count(self.masks)} ({self.why})"


@dataclass(frozen=True, eq=False)
class Grow:
    """Dead blocks return with zero weights.

    Args:
        masks: bool ``[rows, columns]`` by layer, true where a dead block returns.
        protected_until: first step at which they may be removed again.
    """

    masks: Mapping[str, Tensor]
    protected_until: int = 0

    def __str__(self) -> str:
        return f"grow {_count(self.masks)}"


@dataclass(frozen=True, eq=False)
class Rewire:
    """Live blocks die and as many dead blocks of the same layer come alive with zero weights.

    Args:
        dropped: bool ``[rows, columns]`` by layer, true where a live block goes.
        grown: the same layers, true where a block begins that was dead before: as many in each.
        protected_until: first step at which those that begin may be removed.
    """

    dropped: Mapping[str, Tensor]
    grown: Mapping[str, Tensor]
    protected_until: int = 0

    def __str__(self) -> str:
        return f"rewire {_count(self.dropped)}"


@dataclass(frozen=True, eq=False)
class Cut:
    """Dead, constant or silent neurons leave the network, with all that makes and reads them.

    Args:
        found: what to cut, with the constants that move into biases.
        example: the inputs that these constants were seen with; copies that follow see their own with them.
        why: neurons that did something until now, by the reason for which they go (see :class:`Release`).
    """

    found: CutReport
    example: ExampleInputs
    why: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        neurons = ", ".join(f"{count} of {name}" for name, count in self.found.neurons.items())
        return f"cut neurons: {neurons}"


@dataclass(frozen=True)
class Resize:
    """Free slots leave weights, gradients and optimizer state.

    Args:
        capacities: number of slots from now on, by layer.
    """

    capacities: Mapping[str, int]

    def __str__(self) -> str:
        return "resize " + ", ".join(f"{name} to {slots}" for name, slots in self.capacities.items())


Edit = Release | Grow | Rewire | Cut | Resize


def count_blocks(masks: Mapping[str, Tensor]) -> int:
    """Blocks that the masks name. Syncs."""
    return sum(int(mask.sum()) for mask in masks.values())


def _count(masks: Mapping[str, Tensor]) -> str:
    parts = [f"{count} of {name}" for name, mask in masks.items() if (count := int(mask.sum()))]
    return "blocks: " + (", ".join(parts) or "none")
