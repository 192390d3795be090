"""Which whole neurons go first, and how many of them a wish for weights takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Unit:
    """A group of neurons that can only go together.

    Attributes:
        number: of the group in the map of neurons.
        name: of the layer that it is named after.
        score: what it is worth; higher = keep.
        neurons: outputs of that layer.
        sides: by layer, how many outputs and inputs it loses with the group.
    """

    number: int
    name: str
    score: float
    neurons: int
    sides: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Width:
    """A layer that loses outputs and inputs.

    Attributes:
        inputs: 1 for a layer that works channel by channel.
        each: weights per output and input that live (the taps of a convolution); where the target is a share
            of FLOPs, FLOPs per output and input, and ``tokens`` is 1.
        tokens: that the layer sees in a step.
        least: outputs that have to stay, at least one.
        first: outputs before anything was cut; 0: as many as now.
    """

    outputs: int
    inputs: int
    each: float = 1.0
    tokens: int = 1
    least: int = 1
    first: int = 0

    @property
    def weights(self) -> float:
        """Weights that live."""
        return self.outputs * self.inputs * self.each

    def without(self, outputs: int, inputs: int) -> Width:
        """The layer after it has lost so many of each."""
        return replace(self, outputs=self.outputs - outputs, inputs=self.inputs - inputs)


@dataclass
class Choice:
    """Units in the order in which they go.

    Attributes:
        gone: weights that are gone with the first one, with the first two, and so on.
    """

    units: list[Unit] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)

    def weights(self, count: int) -> float:
        """Weights that go with the first ``count`` units."""
        return self.gone[count - 1] if count else 0.0

    def reaching(self, weights: float) -> int:
        """The least number of units with which so many weights go; all where they do not suffice."""
        return next((n for n in range(len(self.units) + 1) if self.weights(n) >= weights), len(self.units))


def saved_flops(unit: Unit, widths: Mapping[str, Width]) -> float:
    """FLOPs of a training step that go with the unit: six per weight and token (forward, input gradient,
    weight gradient). Norms are not counted."""
    total = 0.0
    for name, (outputs, inputs) in unit.sides.items():
        width = widths[name]
        total += 6.0 * (width.weights - width.without(outputs, inputs).weights) * width.tokens
    return max(total, 1.0)


def in_order(units: Sequence[Unit], widths: Mapping[str, Width], allocation: str = "global") -> list[Unit]:
    """The units, the least wanted first: by score per FLOP saved.

    Args:
        allocation: "global" compares all of them. With "uniform" each layer's neurons go in this order, and
            any first part of the whole leaves the same share of what every layer had at first.
    """
    costs: dict[tuple[tuple[str, int, int], ...], float] = {}

    def per_flop(unit: Unit) -> float:
        key = tuple((name, *sides) for name, sides in unit.sides.items())
        if key not in costs:
            costs[key] = saved_flops(unit, widths)
        return unit.score * costs[key] if unit.score < 0 else unit.score / costs[key]

    ordered = sorted(units, key=lambda unit: (per_flop(unit), unit.number))
    if allocation == "global":
        return ordered
    gone, shares = Counter[str](), {}
    for unit in ordered:
        width = widths[unit.name]
        first, before = width.first or width.outputs, gone[unit.name]
        gone[unit.name] += unit.neurons
        # At the middle of the unit: heads round to the nearest number of them.
        shares[unit.number] = 1 - (width.outputs - before - unit.neurons / 2) / first
    return sorted(ordered, key=lambda unit: shares[unit.number])


def choose(ordered: Iterable[Unit], widths: Mapping[str, Width], wish: float) -> Choice:
    """Units in this order until ``wish`` weights go; a unit that a layer's floor keeps is passed over.

    Every layer keeps its floor of outputs, and an input.
    """
    left, choice, gone = dict(widths), Choice(), 0.0
    for unit in ordered:
        if gone >= wish:
            break
        after = {name: left[name].without(*sides) for name, sides in unit.sides.items()}
        if any(width.outputs < width.least or width.inputs < 1 for width in after.values()):
            continue
        gone += sum(left[name].weights - width.weights for name, width in after.items())
        left.update(after)
        choice.units.append(unit)
        choice.gone.append(gone)
    return choice
