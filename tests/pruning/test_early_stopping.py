"""When training stops and which epoch's weights are kept, dense and while a network is being pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from dynaprune.pruning.early_stopping import EarlyStopping

BEING_PRUNED, SCHEDULE_ENDED, TARGET_REACHED = 0, 1, 2


def _epochs_until_stop(stopping: EarlyStopping, losses: Iterable[float]) -> int:
    for epoch, loss in enumerate(losses, 1):
        stopping.update(epoch, loss, standing=TARGET_REACHED)
        if stopping.should_stop:
            return epoch
    return 0


def test_a_dense_run_stops_after_patience_epochs_without_a_lower_loss() -> None:
    stopping = EarlyStopping(patience=3)
    assert _epochs_until_stop(stopping, [1.0, 0.5, 0.6, 0.5, 0.7, 0.1]) == 5
    assert (stopping.best_epoch, stopping.best_loss) == (2, 0.5)


def test_before_the_target_no_epoch_is_the_best_and_none_uses_up_patience() -> None:
    stopping = EarlyStopping(patience=2)
    for epoch in range(1, 20):
        assert not stopping.update(epoch, 1.0 + epoch, standing=BEING_PRUNED)
        assert not stopping.should_stop and stopping.best_epoch is None
    assert stopping.update(20, 99.0, standing=TARGET_REACHED)
    assert stopping.best_epoch == 20
    assert not stopping.update(21, 99.5, standing=TARGET_REACHED)
    assert not stopping.should_stop
    stopping.update(22, 99.5, standing=TARGET_REACHED)
    assert stopping.should_stop


def test_the_end_of_the_schedule_makes_epochs_eligible_where_the_target_is_not_reached() -> None:
    stopping = EarlyStopping(patience=2)
    assert stopping.update(1, 0.3, standing=SCHEDULE_ENDED)
    assert stopping.best_epoch == 1


def test_a_network_at_its_target_beats_a_larger_one_with_a_lower_loss() -> None:
    stopping = EarlyStopping(patience=9)
    assert stopping.update(1, 0.3, standing=SCHEDULE_ENDED)
    assert not stopping.update(2, 0.4, standing=SCHEDULE_ENDED)
    assert stopping.update(3, 0.9, standing=TARGET_REACHED)
    assert not stopping.update(4, 0.2, standing=SCHEDULE_ENDED)
    assert (stopping.best_epoch, stopping.best_loss) == (3, 0.9)
    assert stopping.update(5, 0.8, standing=TARGET_REACHED)


def test_a_structural_change_starts_patience_anew() -> None:
    stopping = EarlyStopping(patience=2)
    stopping.update(1, 0.1, standing=TARGET_REACHED)
    stopping.update(2, 0.2, standing=TARGET_REACHED)
    stopping.update(3, 0.2, standing=TARGET_REACHED, structure_changed=True)
    assert not stopping.should_stop
    stopping.update(4, 0.2, standing=TARGET_REACHED)
    assert not stopping.should_stop
    stopping.update(5, 0.2, standing=TARGET_REACHED)
    assert stopping.should_stop and stopping.best_epoch == 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(loss: float) -> None:
    stopping = EarlyStopping(patience=2)
    assert not stopping.update(1, loss, standing=TARGET_REACHED)
    assert not stopping.should_stop
    stopping.update(2, loss, standing=TARGET_REACHED)
    assert stopping.should_stop and stopping.best_epoch is None


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 epoch, got 0"):
        EarlyStopping(patience=0)


def test_an_unknown_standing_is_refused() -> None:
    with pytest.raises(ValueError, match="standing of 0, 1 or 2, got 3"):
        EarlyStopping(patience=1).update(1, 0.5, standing=3)
