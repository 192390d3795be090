"""Repeat a comparison over seeds and cross-validation folds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynaprune.experiment.compare import compare
from dynaprune.experiment.controls import ARMS, arm_name
from dynaprune.experiment.interrupts import ArmInterrupts, signals_taken
from dynaprune.experiment.out_folder import check_settings
from dynaprune.experiment.rates import read_rates
from dynaprune.experiment.run_config import Resuming, RunConfig
from dynaprune.experiment.saved_results import read_json, read_report
from dynaprune.experiment.sole_writer import sole_writer
from dynaprune.experiment.summary import RowsOfRuns, summarise
from dynaprune.experiment.summary_text import summary_markdown
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.test_rows import read_test_rows
from dynaprune.experiment.write import write_json, write_text

__all__ = ["plan", "repeat", "rows_of_runs"]


def plan(config: RunConfig, seeds: list[int], folds: int | None) -> list[tuple[str, RunConfig]]:
    """``(folder, configuration)`` of each run: every fold of every seed (each seed shuffles its own
    folds)."""
    if not seeds:
        raise ValueError("expected at least one seed, got none")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"expected different seeds, got {seeds}")
    if folds is None:
        return [(f"seed-{seed}", replace(config, seed=seed)) for seed in seeds]
    return [
        (f"seed-{seed}-fold-{fold}", replace(config, seed=seed, fold=fold, folds=folds))
        for seed in seeds
        for fold in range(folds)
    ]


def _finished(folder: Path, config: RunConfig, controls: Sequence[str]) -> dict[str, Any] | None:
    """The report in ``folder`` if that run is complete, with all ``controls``; ValueError if it was made with
    other settings or is damaged."""
    path = folder / "report.json"
    if not path.is_file():
        return None
    report = read_report(path)
    check_settings(folder, (report or read_json(path))["config"], config)
    if report is not None and any(arm_name(arm) not in report.get("controls", {}) for arm in controls):
        return None
    return report


def rows_of_runs(folders: Mapping[str, Path], controls: Iterable[str]) -> RowsOfRuns:
    """What the arms of each run have kept of every test row; ValueError for a damaged file."""
    arms = [arm_name(arm) for arm in (*ARMS, *controls)]
    return {run: {arm: read_test_rows(folder / arm) for arm in arms} for run, folder in folders.items()}


def repeat(
    config: RunConfig,
    out: Path,
    seeds: list[int],
    folds: int | None,
    *,
    controls: Sequence[str] = (),
    rates: Path | None = None,
    pictures: bool = False,
    quiet: bool = False,
    resuming: Resuming | None = None,
) -> tuple[dict[str, Any] | None, bool]:
    """Run the plan, each run in its folder under ``out``; runs finished before with the same settings are
    kept, and one that was cut short goes on. ``rates`` is a ``pilot.json``.

    Writes ``summary.json`` and ``summary.md`` after every run. Returns (the summary or None, interrupted).

    Raises:
        ValueError: another process writes ``out``; reports in it that are damaged or have other settings.
        ArmFailed: an arm ended without a result. OSError: ``out`` cannot be written.
    """
    runs = plan(config, seeds, folds)
    reports = {}
    arms = (*ARMS, *controls)
    of_pilots = {name: {} if rates is None else read_rates(rates, each, arms) for name, each in runs}
    for name, each in runs:
        found = _finished(out / name, each, controls)
        if found is not None:
            reports[name] = found
    if reports and not quiet:
        print(f"{len(reports)} of {len(runs)} runs are there already", file=sys.stderr)
    summary, interrupts = None, ArmInterrupts()
    with sole_writer(out), signals_taken(interrupts.take):
        for number, (name, each) in enumerate(runs, 1):
            if name not in reports:
                report = compare(
                    each,
                    out / name,
                    controls=controls,
                    rates=of_pilots[name],
                    quiet=True,
                    pictures=pictures,
                    interrupts=interrupts,
                    resuming=(resuming or Resuming()).within(name),
                )
                if interrupts.seen:
                    break
                reports[name] = report
                if not quiet:
                    print(_line(number, len(runs), name, report), file=sys.stderr, flush=True)
            done = {n: reports[n] for n, _ in runs if n in reports}
            summary = summarise(done, len(runs), rows_of_runs({n: out / n for n in done}, controls))
            write_json(out / "summary.json", summary)
            write_text(out / "summary.md", summary_markdown(summary))
        return summary, interrupts.seen > 0


def _line(number: int, runs: int, name: str, report: dict[str, Any]) -> str:
    baseline, pruned, metric = report["baseline"], report["pruned"], get_task(report["task"]).metrics[0]
    return (
        f"{number:>4}/{runs}  {name:<18}"
        f" {metric.label} {baseline[metric.key]:.4f} -> {pruned[metric.key]:.4f}"
        f"  sparsity {pruned['sparsity']:.3f} ({pruned['sparsity_of_model']:.3f} of all parameters)"
        f"  step / dense twin {report['ratios'].get('step_seconds_last_to_dense', 0):.2f}"
    )
