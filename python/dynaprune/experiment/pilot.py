"""Pilots: short trainings of a seed that is not reported, which choose the learning rate of each arm."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynaprune.experiment.arm_process import run_in_process
from dynaprune.experiment.arm_settings import PRUNED
from dynaprune.experiment.controls import arm_name
from dynaprune.experiment.interrupts import ArmInterrupts, signals_taken
from dynaprune.experiment.out_folder import CONFIG, check_settings, check_value
from dynaprune.experiment.rates import PILOT_FILE, PILOT_FOLDER, PILOT_SEED, collect
from dynaprune.experiment.run_config import Resuming, RunConfig
from dynaprune.experiment.saved_results import read_json
from dynaprune.experiment.sole_writer import sole_writer
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.write import write_json

__all__ = ["Grid", "pilot"]

_OF_SPARSE_START = (PRUNED, "static", "stretch")
_MOST_EXTENSIONS = 4


@dataclass(frozen=True)
class Grid:
    """What is tried: ``rates`` times the learning rate of the settings, each with every one of
    ``multipliers`` for blocks that begin sparse. None: the multiplier of the settings."""

    rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    multipliers: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rates", "multipliers"):
            values = getattr(self, name)
            if values is not None and not (values and all(math.isfinite(v) and v > 0 for v in values)):
                raise ValueError(f"expected pilot {name} above 0, got {values}")


@dataclass(frozen=True, order=True)
class _Point:
    rate: float
    multiplier: float | None

    @property
    def folder(self) -> str:
        return f"{self.rate:g}" + ("" if self.multiplier is None else f"-x{self.multiplier:g}")


def pilot(
    config: RunConfig,
    arms: Sequence[str],
    out: Path,
    *,
    grid: Grid | None = None,
    quiet: bool = False,
    resuming: Resuming | None = None,
) -> bool:
    """Choose the rates of each of ``arms`` (NAME or NAME=VALUE); write ``out/pilot.json``. Returns whether an
    interrupt has cut it short; the same call goes on.

    Each pilot has a third of the training's steps and the seed 100. What counts is the task's first metric on
    the validation part. Where the best value lies at an edge of the grid, the next one beyond it is tried,
    four times at most.

    Raises:
        ValueError: another process pilots one of the arms in ``out``, or it holds pilots of other settings.
        ArmFailed: a pilot ended without a result. OSError: ``out`` cannot be written.
    """
    interrupts = ArmInterrupts()
    with signals_taken(interrupts.take):
        for arm in arms:
            _pilot_arm(config, arm, out, grid or Grid(), quiet, resuming or Resuming(), interrupts)
            if interrupts.seen:
                return True
            collect(out)
    return False


def _pilot_arm(
    config: RunConfig,
    arm: str,
    out: Path,
    grid: Grid,
    quiet: bool,
    resuming: Resuming,
    interrupts: ArmInterrupts,
) -> None:
    name, metric = arm_name(arm), get_task(config.task).metrics[0]
    own = replace(config, seed=PILOT_SEED, fold=None, folds=None, pilot=True)
    folder = out / PILOT_FOLDER / name
    with sole_writer(folder) as lock:
        if (folder / CONFIG).is_file():
            check_settings(folder, read_json(folder / CONFIG), own)
        write_json(folder / CONFIG, own.to_json())
        tried: dict[_Point, dict[str, Any]] = {}
        for point in _points(own, name, grid, tried, lower=metric.lower_is_better):
            given = replace(own, lr=point.rate, **_sparse_rate(point))
            result = _finished(folder / point.folder, arm, given)
            if result is None:
                within = resuming.within(f"pilot-{name}-{point.folder}")
                found = run_in_process(
                    folder / CONFIG, given, arm, folder / point.folder, within, interrupts, True, lock
                )
                if found is None or found["result"]["interrupted"]:
                    return
                result = found["result"]
            tried[point] = _row(point, result, f"validation_{metric.name}")
            if not quiet:
                print(f"pilot {name:>13}  {_told(tried[point])}", file=sys.stderr, flush=True)
        best = _best(tried, lower=metric.lower_is_better)
        said = {"config": own.to_json(), **tried[best], "grid": [tried[each] for each in sorted(tried)]}
        write_json(folder / PILOT_FILE, said)


def _sparse_rate(point: _Point) -> dict[str, Any]:
    return {} if point.multiplier is None else {"sparse_rate": f"{point.multiplier:g}"}


def _finished(folder: Path, arm: str, given: RunConfig) -> dict[str, Any] | None:
    if not (folder / "arm.json").is_file():
        return None
    check_settings(folder, read_json(folder / CONFIG), given)
    found: dict[str, Any] = read_json(folder / "arm.json")["result"]
    check_value(folder, found, arm)
    return None if found["interrupted"] else found


def _row(point: _Point, result: dict[str, Any], metric: str) -> dict[str, Any]:
    value = result.get(metric)
    settings = result["settings"]
    return {
        "lr": point.rate,
        "sparse_rate": settings["sparse_rate"],
        "metric": metric,
        "value": value if value is not None and math.isfinite(value) else None,
        "steps": result["steps"],
        "train_seconds": result["train_seconds"],
    }


def _told(row: dict[str, Any]) -> str:
    rate = "" if row["sparse_rate"] is None else f", sparse layers x{row['sparse_rate']}"
    value = "diverged" if row["value"] is None else f"{row['value']:.4f}"
    return f"learning rate {row['lr']:g}{rate}: {row['metric'].replace('_', ' ')} {value}"


def _best(tried: dict[_Point, dict[str, Any]], *, lower: bool) -> _Point:
    """The point of the best value; of equal ones that of the lower rate. ValueError where all diverged."""
    values = {point: row["value"] for point, row in sorted(tried.items()) if row["value"] is not None}
    if not values:
        raise ValueError(f"expected a learning rate that does not diverge, got {sorted(tried)}")
    return (min if lower else max)(values, key=lambda point: values[point])


def _points(
    config: RunConfig, name: str, grid: Grid, tried: dict[_Point, dict[str, Any]], *, lower: bool
) -> Iterator[_Point]:
    """The points of the grid, then those beyond an edge where the best of ``tried`` lies there."""
    multipliers: tuple[float | None, ...] = (None,)
    if grid.multipliers and config.initial_sparsity and name in _OF_SPARSE_START:
        multipliers = grid.multipliers
    yield from (_Point(config.lr * rate, each) for rate in grid.rates for each in multipliers)
    for _ in range(_MOST_EXTENSIONS):
        further = _beyond(tried, _best(tried, lower=lower))
        if not further:
            return
        yield from further


def _beyond(tried: dict[_Point, dict[str, Any]], best: _Point) -> list[_Point]:
    """The neighbours of ``best`` that lie beyond what was tried, at twice and half of it."""
    found = [replace(best, rate=rate) for rate in _further([point.rate for point in tried], best.rate)]
    many = [point.multiplier for point in tried if point.multiplier is not None]
    if best.multiplier is not None and len(set(many)) > 1:
        found += [replace(best, multiplier=each) for each in _further(many, best.multiplier)]
    return [point for point in found if point not in tried]


def _further(tried: Sequence[float], best: float) -> list[float]:
    above = [2 * best] if best == max(tried) else []
    return above + ([best / 2] if best == min(tried) else [])
