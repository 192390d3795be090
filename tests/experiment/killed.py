"""Small arms, and the end of one in the middle of its training as if its process had been killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynaprune.experiment import metrics, steps, train
from dynaprune.experiment.run_config import Resuming, RunConfig, resolve
from dynaprune.experiment.steps import TrainState
from dynaprune.experiment.tasks import digits
from dynaprune.pruning.early_stopping import EarlyStopping
from tests.experiment.same_course import differences


@contextlib.contextmanager
def small_arms() -> Iterator[None]:
    """Digits has a small network, and the third of four epochs counts as the best, whatever the losses
    are."""
    widths, update = digits.WIDTHS, EarlyStopping.update

    def third_is_best(self: EarlyStopping, epoch: int, loss: float, **given: Any) -> bool:
        return update(self, epoch, abs(epoch - 3.0), **given)

    digits.WIDTHS = [64, 96, 96, 10]
    EarlyStopping.update = third_is_best  # type: ignore[method-assign]
    try:
        yield
    finally:
        digits.WIDTHS = widths
        EarlyStopping.update = update  # type: ignore[method-assign]


class Killed(BaseException):
    """Nothing in the arm's own code catches it."""


@contextlib.contextmanager
def killed_at(step: int | None) -> Iterator[None]:
    """The arm's step number ``step`` in this process is its last, after the optimizer's and before anything
    else."""
    real, made = TrainState.step, 0

    def counted(self: TrainState, *given: Any, **named: Any) -> Any:
        nonlocal made
        loss = real(self, *given, **named)
        made += 1
        if made == step:
            raise Killed
        return loss

    TrainState.step = counted  # type: ignore[method-assign]
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        TrainState.step = real  # type: ignore[method-assign]


def small_digits(**given: Any) -> RunConfig:
    """Four epochs of 20 steps. Blocks go, come back and take neurons along within the first two."""
    settings = {
        "epochs": 4,
        "seed": 1,
        "batch_size": 64,
        "lr": 0.03,
        "schedule": "linear",
        "warmup_steps": 5,
        "max_grad_norm": 1.0,
        "target_sparsity": 0.6,
        "calibration_samples": 128,
        "trial_budget": 0.5,
        "block_size": 8,
    }
    config = resolve("digits", **{**settings, **given})
    return replace(config, pruning={**config.pruning, "regrow": 0.3, "end": 0.5, "interval": 4})


def run(
    config: RunConfig,
    arm: str,
    out: Path,
    *,
    kill: int | None = None,
    minutes: float = 10,
    pretrained: Path | None = None,
    **given: Any,
) -> dict[str, Any] | None:
    """Train the arm, or what is left of it; None where it was killed at its step number ``kill``. Hardly any
    steps are timed afterwards."""
    resuming = Resuming(checkpoint_minutes=minutes, **given)
    timed = ((steps, "_ROUNDS", 1), (steps, "_STEPS_PER_ROUND", 1), (metrics, "STEPS_TIMED", 1))
    with pytest.MonkeyPatch.context() as patch, killed_at(kill):
        for module, name, count in timed:
            patch.setattr(module, name, count)
        return train.run_arm(config, arm, out, quiet=True, pretrained=pretrained, resuming=resuming)
    return None


def saved_steps(folder: Path) -> list[int]:
    """The steps after which a checkpoint lies in ``folder``."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))


def differences_when_killed(
    config: RunConfig, arm: str, whole: Path, out: Path, *, kills: Sequence[int], **given: Any
) -> list[str]:
    """Train the arm in parts, of which each is killed at its step of that number and loses it; what then
    differs from the undisturbed one in ``whole``."""
    for kill in kills:
        assert run(config, arm, out, kill=kill, minutes=0, **given) is None
    result = run(config, arm, out, **given)
    assert result is not None and len(result["parts"]) == len(kills) + 1
    return differences(whole, out)
