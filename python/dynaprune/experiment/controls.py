"""The controls of a comparison: what the FLOPs of the pruned arm buy without its method, or part of it.

A control is worked out from the settings of the pruned arm before any training: its FLOPs are those that the
pruned arm's schedule plans. Controls have no dropout, as the pruned arm has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynaprune.experiment.arm_settings import BASELINE, PRUNED, ArmSettings, shortened_for_pilot
from dynaprune.experiment.length import samples_until, total_steps, with_steps
from dynaprune.experiment.narrower import nearest_width
from dynaprune.experiment.planned_flops import (
    flops_of_dense,
    flops_of_pruned,
    flops_of_pruned_by_steps,
    flops_of_sample,
    rows_of,
)
from dynaprune.experiment.run_config import RunConfig
from dynaprune.experiment.tasks import Task, TaskData
from dynaprune.pruning.budget import most_steps

__all__ = ["ARMS", "CONTROLS", "arm_name", "arm_settings", "check_controls"]

ARMS = (BASELINE, PRUNED)
_OF_SPARSE = (
    "initial_sparsity",
    "sparse_rate",
    "rewire",
    "rewire_growth",
    "rewire_score",
    "rewire_until",
    "rewire_audit",
)
_RAMP_END = 0.3


@dataclass(frozen=True)
class Asked:
    """What a control is made of: the comparison's settings, and the ``value`` given with its name."""

    config: RunConfig
    task: Task
    data: TaskData
    value: str | None


def _without(config: RunConfig, names: Sequence[str]) -> RunConfig:
    nothing: dict[str, Any] = dict.fromkeys(names)
    return replace(config, dropout=0.0, **nothing)


def _never_sparse(config: RunConfig) -> RunConfig:
    return _without(config, _OF_SPARSE)


def _planned(flops: float, target: float) -> dict[str, Any]:
    return {"flops_planned": flops, "flops_planned_of_pruned": target, "ratio_planned": flops / target}


def _small(asked: Asked, kind: str) -> ArmSettings:
    """The dense network that is narrower, with the FLOPs of the pruned arm."""
    target = flops_of_pruned(asked.config, asked.task, asked.data)
    config = _never_sparse(asked.config)
    rows = rows_of(asked.data)
    samples = samples_until(total_steps(config, rows), config, rows)

    def flops(options: dict[str, Any]) -> float:
        return samples * flops_of_sample(replace(config, options=options), asked.task, asked.data)[0]

    options, reached = nearest_width(asked.task, kind, config.options, target, flops)
    changed = {name: value for name, value in options.items() if value != config.options[name]}
    plan = {**changed, **_planned(reached, target)}
    return ArmSettings(kind, replace(config, options=options), pruned=False, plan=plan)


def small(asked: Asked) -> ArmSettings:
    """Dense and narrower throughout, the FLOPs of the pruned arm."""
    return _small(asked, "small")


def small_inner(asked: Asked) -> ArmSettings:
    """Dense, the full residual width, narrower inside of its layers, the FLOPs of the pruned arm."""
    return _small(asked, "small-inner")


def short(asked: Asked) -> ArmSettings:
    """The dense network with fewer steps, its schedule shortened with them, the FLOPs of the pruned arm."""
    target = flops_of_pruned(asked.config, asked.task, asked.data)
    config, rows = _never_sparse(asked.config), rows_of(asked.data)
    whole = flops_of_dense(config, asked.task, asked.data)
    every = total_steps(config, rows)
    of_sample = whole / samples_until(every, config, rows)
    steps = max(1, round(every * target / whole))
    plan = {"steps": steps, **_planned(of_sample * samples_until(steps, config, rows), target)}
    return ArmSettings("short", with_steps(config, steps, rows), pruned=False, plan=plan)


def static(asked: Asked) -> ArmSettings:
    """The sparse start without rewiring."""
    if not asked.config.initial_sparsity:
        raise ValueError("expected an initial_sparsity for the control static, got none: it begins sparse")
    config = _without(asked.config, [name for name in _OF_SPARSE if name.startswith("rewire")])
    target = flops_of_pruned(asked.config, asked.task, asked.data)
    plan = _planned(flops_of_pruned(config, asked.task, asked.data), target)
    return ArmSettings("static", config, pruned=True, plan=plan)


def gradual_early(asked: Asked) -> ArmSettings:
    """Dense at first, the target sparsity in every layer by 30% of the training, without a trial."""
    schedule = {"start": 0.0, "end": _RAMP_END, "allocation": "uniform"}
    pruning = {**asked.config.pruning, **schedule}
    config = replace(_never_sparse(asked.config), pruning=pruning, calibration_samples=0)
    target = flops_of_pruned(asked.config, asked.task, asked.data)
    plan = _planned(flops_of_pruned(config, asked.task, asked.data), target)
    return ArmSettings("gradual-early", config, pruned=True, plan=plan)


def small_time(asked: Asked) -> ArmSettings:
    """Dense and narrower, of the width that is given: one that was measured to take the pruned arm's time."""
    name = asked.task.width_option
    if name is None:
        raise ValueError(f"{asked.task.name} has no width for the control small-time")
    config, default = _never_sparse(asked.config), asked.task.options[name]
    assert asked.value is not None
    try:
        width = type(default)(asked.value)
    except ValueError:
        raise ValueError(f"expected small-time={name} like {default!r}, got {asked.value!r}") from None
    config = replace(config, options={**config.options, name: width})
    target = flops_of_pruned(asked.config, asked.task, asked.data)
    plan = {name: width, **_planned(flops_of_dense(config, asked.task, asked.data), target)}
    return ArmSettings("small-time", config, pruned=False, plan=plan)


def stretch(asked: Asked) -> ArmSettings:
    """The pruned arm with more steps: a factor of its own, or for a share of the dense training's FLOPs."""
    config, rows, value = asked.config, rows_of(asked.data), asked.value or "2"
    number = _positive(value.removesuffix("%"), f"stretch=FACTOR or stretch=SHARE%, got {value!r}")
    planned = flops_of_pruned_by_steps(config, asked.task, asked.data)
    usual = total_steps(config, rows)
    steps = max(1, round(number * usual))
    if value.endswith("%"):
        budget = number / 100 * flops_of_dense(config, asked.task, asked.data)
        steps = most_steps(planned, budget)
        if steps == 0:
            raise ValueError(f"expected a budget of at least one step, got {budget:.4g} FLOPs")
    config = replace(with_steps(config, steps, rows), dropout=0.0)
    plan = {"steps": steps, **_planned(planned(steps), planned(usual))}
    return ArmSettings("stretch", config, pruned=True, plan=plan)


def _positive(text: str, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"expected {expected}")
    return number


CONTROLS: dict[str, Callable[[Asked], ArmSettings]] = {
    "small": small,
    "small-inner": small_inner,
    "short": short,
    "static": static,
    "gradual-early": gradual_early,
    "small-time": small_time,
    "stretch": stretch,
}
_WITH_VALUE = {"small-time": True, "stretch": False}  # the controls that take one, and whether they need it


def arm_name(arm: str) -> str:
    """The name of an arm that is given as NAME or NAME=VALUE; ValueError for one that does not exist."""
    name, equals, value = arm.partition("=")
    if name not in (*ARMS, *CONTROLS):
        raise ValueError(f"--arm must be one of {', '.join((*ARMS, *CONTROLS))}, got {arm!r}")
    if equals and (name not in _WITH_VALUE or not value):
        raise ValueError(f"expected {name} without a value, got {arm!r}")
    if not equals and _WITH_VALUE.get(name):
        raise ValueError(f"expected {name}=VALUE, got {arm!r}")
    return name


def check_controls(arms: Sequence[str]) -> None:
    """ValueError unless every one of ``arms`` (NAME or NAME=VALUE) is a control, and none comes twice."""
    names = [arm.partition("=")[0] for arm in arms]
    if any(name not in CONTROLS for name in names) or len(set(names)) != len(names):
        raise ValueError(
            f"--controls takes different names of {', '.join(CONTROLS)} with commas between them, got "
            f"{','.join(arms)!r}"
        )
    for arm in arms:
        arm_name(arm)


def arm_settings(arm: str, config: RunConfig, task: Task, data: TaskData) -> ArmSettings:
    """The ``arm`` (NAME or NAME=VALUE) of a comparison with ``config``, on ``data`` that were loaded for it.

    Raises:
        ValueError: no such arm, or settings that it cannot be made for.
    """
    name = arm_name(arm)
    if name in ARMS:
        found = ArmSettings(name, config, name == PRUNED)
    else:
        value = arm.partition("=")[2] or None
        found = CONTROLS[name](Asked(config, task, data, value))
        if value is not None:
            found = replace(found, plan={"asked": arm, **found.plan})
    if config.pilot:
        found = replace(found, config=shortened_for_pilot(found.config, rows_of(data)))
    return found
