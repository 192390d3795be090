"""The policy that a configuration asks for when it hands in none."""

from __future__ import annotations

import math
from dataclasses import replace

from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.by_turns import ByTurns
from dynaprune.pruning.decide.drop_and_grow import DropAndGrow
from dynaprune.pruning.decide.gradual import Gradual, regrowth_end
from dynaprune.pruning.decide.gradual_neurons import GradualNeurons
from dynaprune.pruning.decide.pace import LATEST_END, CubicPace, PaceWithInterval, SelfPaced, Standstill
from dynaprune.pruning.decide.policy import Policy
from dynaprune.pruning.decide.rewire_first import RewireFirst
from dynaprune.pruning.decide.trial import Trial
from dynaprune.pruning.decide.trial_budget import TrialBudget
from dynaprune.pruning.decide.trial_event import minimum_interval
from dynaprune.pruning.decide.trial_rules import TrialRules
from dynaprune.pruning.settings import BLOCKS, BOTH, Schedule

EVENTS_WANTED, EVENTS_AT_LEAST = 20, 10
SELF_PACED_INTERVAL = 50
DEFAULT_BUDGET = 0.05
REWIRING_INTERVAL = 100
NEURONS_OF_BOTH = 0.5


def built_in_policy(config: PruningConfig, trial: Trial | None) -> Policy:
    """Gradual with a target sparsity, self-paced without one; of blocks, whole neurons, or both by turns.

    Where blocks are rewired, that comes first.
    """
    if not config.rewire:
        return removing_policy(config, trial)
    rewiring = rewiring_policy(config)
    return rewiring if config.stands_still else RewireFirst(rewiring, removing_policy(config, trial))


def rewiring_policy(config: PruningConfig) -> DropAndGrow:
    """Drop and grow, by default every hundredth step, and at least twenty times."""
    assert config.total_steps is not None
    until = max(2, math.floor(config.rewire_until * config.total_steps))
    interval = config.interval or max(1, min(REWIRING_INTERVAL, until // EVENTS_WANTED))
    return DropAndGrow(
        config.rewire,
        until,
        interval,
        growth=config.rewire_growth,
        seed=config.seed,
        rules=config.trial_rules,
        audits=config.rewire_audit,
    )


def removing_policy(config: PruningConfig, trial: Trial | None) -> Policy:
    """What removes, up to the target or as far as the trial lets it."""
    samples = None if trial is None else trial.samples
    pace: PaceWithInterval = Standstill(config.initial_sparsity)
    if not config.stands_still:
        start, stop = config.rewiring.span(config.start, config.end)
        schedule, latest = replace(config.schedule, start=start, end=stop), config.rewiring.latest_end
        pace = make_pace(schedule, config.trial_rules, samples, config.initial_sparsity, latest)
    end: int | None = getattr(pace, "end_step", None)
    budget = TrialBudget.of(config.trial_budget, config.total_steps, end, samples, config.batch_size)
    blocks = Gradual(
        pace,
        config.trial_rules,
        budget,
        allocation=config.allocation,
        per_flop=config.cost == "flops",
        whole_neurons=tries_neurons(config, trial),
        regrow=config.regrow,
        regrow_until=regrowth_end(config.end, config.total_steps),
    )
    if config.units == BLOCKS:
        return blocks
    share = NEURONS_OF_BOTH if config.units == BOTH else 1.0
    neurons = GradualNeurons(pace, config.trial_rules, budget, allocation=config.allocation, share=share)
    return ByTurns(neurons, blocks) if config.units == BOTH else neurons


def tries_neurons(config: PruningConfig, trial: Trial | None) -> bool:
    """Whether the built-in policy puts whole neurons first, among blocks."""
    if config.units != BLOCKS or config.policy is not None or config.stands_still:
        return False
    return config.neurons and config.allocation == "global" and trial is not None


def make_pace(
    schedule: Schedule,
    rules: TrialRules,
    samples: int | None,
    initial: float = 0.0,
    latest_end: float = LATEST_END,
) -> PaceWithInterval:
    """The pace that the schedule asks for, with its default interval.

    Args:
        rules: of the trials, whose budget spaces the events.
        samples: of a trial's call; None: not known, or there is no trial.
        initial: sparsity that training begins with.
        latest_end: fraction of training by which the schedule has to end.
    """
    affordable, steps = 1, schedule.total_steps
    if samples is not None and schedule.batch_size is not None:
        share = rules.trial_budget or DEFAULT_BUDGET
        affordable = minimum_interval(samples, schedule.batch_size, rules.rungs, share)
    if schedule.target_sparsity is None:
        start = 0 if steps is None else math.floor(schedule.start * steps)
        end = None if steps is None else max(start + 1, math.floor(schedule.end * steps))
        interval = schedule.interval or max(SELF_PACED_INTERVAL, affordable)
        return SelfPaced(interval, schedule.self_paced_share, start_step=start, end_step=end)
    assert steps is not None
    ramp = max(1, math.floor(schedule.end * steps) - math.floor(schedule.start * steps))
    interval = schedule.interval or max(1, ramp // EVENTS_WANTED, min(affordable, ramp // EVENTS_AT_LEAST))
    return CubicPace(
        schedule.target_sparsity,
        schedule.start,
        schedule.end,
        steps,
        interval,
        initial=initial,
        latest_end=latest_end,
    )
