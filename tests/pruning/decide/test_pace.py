"""The schedule, the rule that forces, and that the target is reached whatever the trials say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from dynaprune.pruning.decide.pace import CubicPace, SelfPaced
from dynaprune.pruning.decide.trial_event import minimum_interval


def _run(
    pace: CubicPace, total: int, accepts: Callable[[int], float], steps: int
) -> tuple[int | None, list[tuple[int, int, int, int]]]:
    """Prune ``total`` units; ``accepts(event)`` is the share of a wish that the trial lets pass.

    Returns:
        The step at which the target was reached, and (step, live before, passed, forced) of every event.
    """
    live, events = total, []
    for step in range(1, pace.total_steps + 1):
        if not pace.due(step):
            continue
        wish = pace.wish(step, total, live)
        passed = math.floor(wish * accepts(len(events)))
        forced = pace.forced(step, total, live - passed, wish - passed)
        events.append((step, live, passed, forced))
        live -= passed + forced
        if live <= total - math.ceil(round((pace.target or 0) * total, 6)):
            return step, events
    return None, events


def test_sparsity_is_cubic_between_start_and_end() -> None:
    pace = CubicPace(0.8, 0.1, 0.5, 1000, 10)
    assert pace.sparsity(0) == pace.sparsity(100) == 0
    assert pace.sparsity(300) == pytest.approx(0.8 * (1 - 0.5**3))
    assert pace.sparsity(500) == pace.sparsity(1000) == 0.8
    assert pace.wish(300, 1000, 1000) == 700
    assert pace.wish(300, 1000, 600) == 300
    assert pace.wish(300, 1000, 200) == 0


@pytest.mark.parametrize("total", [1, 7, 10, 3000])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.8, 0.95])
def test_the_last_wish_is_the_target_neither_more_nor_less(total: int, target: float) -> None:
    pace = CubicPace(target, 0, 0.5, 100, 5)
    removed = pace.wish(50, total, total)
    assert removed - 1 < target * total - 1e-6 <= removed


def test_events_come_at_every_interval_after_start_and_at_the_end() -> None:
    pace = CubicPace(0.5, 0.1, 0.55, 1000, 100)
    assert [step for step in range(1, 551) if pace.due(step)] == [200, 300, 400, 500, 550]
    assert not pace.ended(549) and pace.ended(550)


def test_when_trials_accept_nothing_is_forced_and_the_target_comes_at_the_end() -> None:
    pace = CubicPace(0.8, 0.05, 0.6, 1900, 100)
    reached, events = _run(pace, 3000, lambda _: 1.0, 1900)
    assert reached is not None and pace.end_step - 100 < reached <= pace.end_step
    assert all(forced == 0 for *_, forced in events)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("schedule", [(1900, 100), (1900, 25), (5000, 500), (400, 10), (40_000, 853)])
@pytest.mark.parametrize(
    "accepts",
    [lambda _: 0.0, lambda event: float(event % 2), lambda event: float(event < 5), lambda _: 0.25],
    ids=["never", "every second", "only early", "a quarter"],
)
def test_the_target_is_reached_though_trials_reject_and_never_by_a_large_step(
    target: float, schedule: tuple[int, int], accepts: Callable[[int], float]
) -> None:
    pace = CubicPace(target, 0.05, 0.6, *schedule)
    assert pace.forced_share == 0.10
    reached, events = _run(pace, 3000, accepts, pace.total_steps)
    assert reached is not None
    assert reached <= pace.end_step + (pace.total_steps - pace.end_step) * 0.55
    for _, live, passed, forced in events:
        assert forced <= max(1, 0.10 * (live - passed))


def test_a_small_network_reaches_the_target_before_training_ends() -> None:
    for total in (3, 12, 30):
        reached, _ = _run(CubicPace(0.8, 0.05, 0.6, 1900, 100), total, lambda _: 0.0, 1900)
        assert reached is not None and reached < 1900


def test_too_few_steps_raise_the_forced_share_just_enough() -> None:
    pace = CubicPace(0.9, 0.05, 0.6, 20, 1)
    assert 0.10 < pace.forced_share < 0.25
    reached, _ = _run(pace, 3000, lambda _: 0.0, 20)
    assert reached is not None


def test_a_backlog_is_forced_above_five_percent_and_whatever_its_size_after_the_end() -> None:
    pace = CubicPace(0.8, 0, 0.5, 1000, 10)
    assert pace.forced(100, 1000, 900, 50) == 0
    assert pace.forced(100, 1000, 900, 51) == 51
    assert pace.forced(100, 1000, 900, 200) == 90
    assert pace.forced(500, 1000, 900, 0) == 0
    assert pace.forced(500, 1000, 900, 3) == 3
    assert pace.forced(500, 1000, 5, 3) == 1


def test_self_paced_takes_a_share_of_what_lives_and_forces_nothing() -> None:
    pace = SelfPaced(50, 0.10, start_step=100, end_step=300)
    assert [step for step in range(1, 500) if pace.due(step)] == [150, 200, 250, 300]
    assert pace.target is None
    assert pace.wish(150, 1000, 500) == 50
    assert pace.wish(150, 1000, 5) == 1
    assert pace.wish(150, 1000, 0) == 0
    assert pace.forced(300, 1000, 500, 400) == 0
    assert pace.ended(300) and not pace.ended(299)
    assert not SelfPaced(50).ended(10**9)


def test_the_trials_cost_sets_the_least_interval() -> None:
    interval = minimum_interval(1024, 32)
    with pytest.raises(ValueError, match=f"at least {interval} steps, what trials may cost, got 100"):
        CubicPace(0.8, 0.1, 0.5, 100_000, 100, minimum_interval=interval)
    with pytest.raises(ValueError, match=f"at least {interval} steps"):
        SelfPaced(100, minimum_interval=interval)


GOOD: dict[str, Any] = {"target": 0.8, "start": 0.1, "end": 0.5, "total_steps": 1000, "interval": 10}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"target": 0.0}, ValueError, "target between 0 and 1, got 0.0"),
        ({"target": 1.0}, ValueError, "target between 0 and 1, got 1.0"),
        ({"target": float("nan")}, ValueError, "target between 0 and 1, got nan"),
        ({"target": "0.5"}, TypeError, "target to be a number, got str"),
        ({"start": -0.1}, ValueError, "0 <= start < end <= 0.6"),
        ({"start": 0.5}, ValueError, "0 <= start < end <= 0.6"),
        ({"end": 0.7}, ValueError, "0 <= start < end <= 0.6"),
        ({"total_steps": 0}, ValueError, "total_steps of at least 1, got 0"),
        ({"total_steps": 10.0}, TypeError, "total_steps to be an int, got float"),
        ({"interval": 0}, ValueError, "interval of at least 1, got 0"),
        ({"interval": True}, TypeError, "interval to be an int, got bool"),
        ({"interval": 401}, ValueError, "at most 400 steps, the length of the schedule .* got 401"),
    ],
)
def test_wrong_schedules_are_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    CubicPace(**GOOD)
    with pytest.raises(error, match=message):
        CubicPace(**{**GOOD, **wrong})


def test_other_wrong_input_is_refused() -> None:
    pace = CubicPace(**GOOD)
    with pytest.raises(ValueError, match="between 0 and 10 live units, got 11"):
        pace.wish(100, 10, 11)
    with pytest.raises(ValueError, match="backlog of at least 0 units, got -1"):
        pace.forced(100, 10, 5, -1)
    with pytest.raises(ValueError, match="max_share between 0 and 1, got 1"):
        SelfPaced(10, 1)
    with pytest.raises(ValueError, match="end_step of at least 11, got 10"):
        SelfPaced(10, start_step=10, end_step=10)
