"""Pace: when an event comes, how many units it asks for, how many of the rejected go anyway."""

from __future__ import annotations

import math
from typing import Protocol

FORCED_SHARE = 0.10
BACKLOG_SHARE = 0.05
LATEST_END = 0.6


class Pace(Protocol):
    """When and how many. Steps count optimizer steps from 1: the step that has just been taken."""

    target: float | None

    def due(self, step: int) -> bool:
        """Whether an event comes after this step."""

    def wish(self, step: int, total: int, live: int) -> int:
        """How many of ``live`` units to propose for removal, of ``total`` in the dense network."""

    def forced(self, step: int, total: int, live: int, backlog: int) -> int:
        """How many of ``backlog`` units (wished for, not removed by the trial) to remove by score alone.

        Args:
            live: units that live after what passed the trial was removed.
        """

    def ended(self, step: int) -> bool:
        """Whether the schedule is over (units may still be removed to catch up with it)."""


class PaceWithInterval(Pace, Protocol):
    """A pace that says how many steps lie between its events as a rule."""

    interval: int


class CubicPace:
    """Sparsity ``s(p) = initial + (target - initial) * (1 - (1 - p)^3)`` between two points of training
    (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1), with the trial as brake.

    What the trial rejects is carried over to the next event. While this backlog exceeds 5% of all units, and
    from ``end`` on while there is any, at most 10% of the live units are forced per event, so that the
    network recovers in between. Events go on after ``end``, as much closer together as it takes to reach the
    target about halfway between ``end`` and the last step though every trial rejects everything.

    Attributes:
        interval: steps between events up to ``end``.
        catch_up_interval: steps between events afterwards.
        forced_share: 0.10; more only if training has too few steps to reach the target otherwise.
    """

    def __init__(
        self,
        target: float,
        start: float,
        end: float,
        total_steps: int,
        interval: int,
        *,
        minimum_interval: int = 1,
        initial: float = 0.0,
        latest_end: float = LATEST_END,
    ) -> None:
        """Plan the schedule.

        Args:
            target: final share of units removed, in (0, 1).
            start, end: fractions of ``total_steps``, 0 <= start < end <= ``latest_end``.
            total_steps: optimizer steps of the whole training.
            interval: steps between events.
            minimum_interval: what the trial's cost allows.
            initial: share of units that is not there from the start, in [0, target).

        Raises:
            TypeError, ValueError: an argument out of its range, or an interval too long for one event.
        """
        _check_fraction("target", target, low=0, high=1)
        if not 0 <= initial < target:
            raise ValueError(
                f"expected an initial sparsity from 0 to below the target {target}, got {initial}"
            )
        if not 0 <= start < end <= latest_end:
            raise ValueError(
                f"expected 0 <= start < end <= {latest_end:g} as fractions of training, got {start}, {end}"
            )
        _check_steps("total_steps", total_steps)
        _check_interval(interval, minimum_interval)
        self.target: float | None = float(target)
        self.total_steps, self.interval, self._initial = total_steps, interval, float(initial)
        self.start_step = math.floor(start * total_steps)
        self.end_step = max(self.start_step + 1, math.floor(end * total_steps))
        if interval > self.end_step - self.start_step:
            raise ValueError(
                f"expected an interval of at most {self.end_step - self.start_step} steps, the length of the "
                f"schedule (from step {self.start_step} to {self.end_step} of {total_steps}), got {interval}"
            )
        before = math.ceil((self.end_step - self.start_step) / interval)
        stays = (1 - target) / (1 - initial)
        needed = math.ceil(math.log(stays) / math.log(1 - FORCED_SHARE))
        spare = max(1, (total_steps - self.end_step) // 2)
        # The first events may stay below the backlog that forces, and each rounds down.
        self.catch_up_interval = max(1, min(interval, spare // max(needed - before + 4, 1)))
        possible = before + spare // self.catch_up_interval
        self.forced_share = max(FORCED_SHARE, 1 - stays ** (1 / max(possible - 4, 1)))

    def sparsity(self, step: int) -> float:
        """The schedule's sparsity after ``step``."""
        progress = (step - self.start_step) / (self.end_step - self.start_step)
        progress = min(max(progress, 0.0), 1.0)
        return self._initial + ((self.target or 0.0) - self._initial) * (1 - (1 - progress) ** 3)

    def due(self, step: int) -> bool:
        if step <= self.start_step:
            return False
        if step >= self.end_step:
            return (step - self.end_step) % self.catch_up_interval == 0
        return (step - self.start_step) % self.interval == 0

    def wish(self, step: int, total: int, live: int) -> int:
        _check_units(total, live)
        removed = math.ceil(self.sparsity(step) * total - 1e-9 * total)
        return max(0, live - (total - removed))

    def forced(self, step: int, total: int, live: int, backlog: int) -> int:
        _check_units(total, live)
        if backlog < 0:
            raise ValueError(f"expected a backlog of at least 0 units, got {backlog}")
        if backlog == 0 or (not self.ended(step) and backlog <= BACKLOG_SHARE * total):
            return 0
        return min(backlog, max(1, math.floor(self.forced_share * live)))

    def ended(self, step: int) -> bool:
        return step >= self.end_step


class Standstill:
    """Training begins at the target: there are no events."""

    interval = 1

    def __init__(self, target: float) -> None:
        self.target: float | None = target

    def due(self, step: int) -> bool:
        return False

    def wish(self, step: int, total: int, live: int) -> int:
        return 0

    def forced(self, step: int, total: int, live: int, backlog: int) -> int:
        return 0

    def ended(self, step: int) -> bool:
        return True


class SelfPaced:
    """No target: the trial alone decides, on at most ``max_share`` of the live units per event; nothing is
    forced."""

    target: float | None = None

    def __init__(
        self,
        interval: int,
        max_share: float = 0.10,
        *,
        start_step: int = 0,
        end_step: int | None = None,
        minimum_interval: int = 1,
    ) -> None:
        """Plan events at every ``interval`` steps after ``start_step``, up to ``end_step`` (None: no end).

        Raises:
            TypeError, ValueError: an argument out of its range.
        """
        _check_interval(interval, minimum_interval)
        _check_fraction("max_share", max_share, low=0, high=1)
        _check_steps("start_step", start_step, least=0)
        if end_step is not None:
            _check_steps("end_step", end_step, least=start_step + 1)
        self.interval, self.max_share = interval, float(max_share)
        self.start_step, self.end_step = start_step, end_step

    def due(self, step: int) -> bool:
        past = step - self.start_step
        return past > 0 and past % self.interval == 0 and (self.end_step is None or step <= self.end_step)

    def wish(self, step: int, total: int, live: int) -> int:
        _check_units(total, live)
        return min(live, max(1, math.floor(self.max_share * live)))

    def forced(self, step: int, total: int, live: int, backlog: int) -> int:
        return 0

    def ended(self, step: int) -> bool:
        return self.end_step is not None and step >= self.end_step


def _check_fraction(name: str, value: float, *, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__}")
    if not low < value < high:
        raise ValueError(f"expected {name} between {low} and {high}, got {value}")


def _check_steps(name: str, value: int, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {name} to be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}")


def _check_interval(interval: int, minimum: int) -> None:
    _check_steps("interval", interval)
    _check_steps("minimum_interval", minimum)
    if interval < minimum:
        raise ValueError(
            f"expected an interval of at least {minimum} steps, what trials may cost, got {interval}"
        )


def _check_units(total: int, live: int) -> None:
    if not 0 <= live <= total:
        raise ValueError(f"expected between 0 and {total} live units, got {live}")
