"""The FLOPs of a whole training before it has begun, from its schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dynaprune.pruning.builtin import removing_policy, rewiring_policy
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.gradual import Gradual
from dynaprune.pruning.decide.growth import GRADIENT
from dynaprune.pruning.decide.pace import CubicPace
from dynaprune.pruning.settings import BLOCKS


@dataclass(frozen=True)
class FlopsOfSample:
    """FLOPs per sample, forward and backward.

    Attributes:
        begins, ends: of a step at the initial sparsity, and at the target.
        probe: of measuring the gradient where the start has left blocks out.
    """

    begins: float
    ends: float
    probe: float = 0.0


def planned_flops(
    config: PruningConfig, of_sample: FlopsOfSample, samples_until: Callable[[int], int]
) -> float:
    """FLOPs of a training that removes as its schedule says, in the shares of the target.

    Exact where training begins at its target. A trial that holds removals back adds to it, and so do its own
    forward passes; removals that are not in proportion to the FLOPs of the layers shift it.

    Args:
        samples_until: samples that so many first steps train on.

    Raises:
        ValueError: no target, no ``total_steps``, or whole neurons, whose course the trial decides.
    """
    if config.total_steps is None or config.target_sparsity is None or config.units != BLOCKS:
        raise ValueError(
            "expected a target_sparsity and total_steps, of blocks, to know the FLOPs before training, got "
            f"{config.target_sparsity}, {config.total_steps} and units={config.units!r}"
        )
    if config.policy is not None or config.regrow:
        raise ValueError("expected the built-in policy without regrow, to know the FLOPs before training")
    spent, since, now = 0.0, 0, of_sample.begins
    for step, done in _removals(config):
        seen = samples_until(step)
        spent, since = spent + now * (seen - since), seen
        now = of_sample.begins + done * (of_sample.ends - of_sample.begins)
    spent += now * (samples_until(config.total_steps) - since)
    return spent + of_sample.probe * _probed(config, samples_until)


def _removals(config: PruningConfig) -> Iterator[tuple[int, float]]:
    """Steps after which blocks go, and how much of the way to the target is done then."""
    removing = removing_policy(config, None)
    assert isinstance(removing, Gradual) and config.target_sparsity is not None
    pace, initial = removing.pace, config.initial_sparsity
    if not isinstance(pace, CubicPace):
        return
    for step in (*range(pace.start_step + pace.interval, pace.end_step, pace.interval), pace.end_step):
        yield step, (pace.sparsity(step) - initial) / (config.target_sparsity - initial)


def _probed(config: PruningConfig, samples_until: Callable[[int], int]) -> int:
    """Samples of the steps that measure the gradient where no block lives."""
    if not config.rewire or config.rewire_growth != GRADIENT:
        return 0
    rewiring = rewiring_policy(config)
    events = range(rewiring.interval, rewiring.last + 1, rewiring.interval)
    return sum(samples_until(step) - samples_until(step - 1) for step in events)
