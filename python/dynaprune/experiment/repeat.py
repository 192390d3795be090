"""Repeat a comparison over seeds and cross-validation folds, and summarise the paired differences."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynaprune.experiment.compare import compare
from dynaprune.experiment.controls import ARMS, arm_name
from dynaprune.experiment.figure_text import difference_kind, shown
from dynaprune.experiment.interrupts import ArmInterrupts, signals_taken
from dynaprune.experiment.out_folder import check_settings
from dynaprune.experiment.rates import read_rates
from dynaprune.experiment.report import data_of
from dynaprune.experiment.report_text import on_copy
from dynaprune.experiment.run_config import Resuming, RunConfig
from dynaprune.experiment.saved_results import read_json, read_report
from dynaprune.experiment.sole_writer import sole_writer
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.write import write_json, write_text

__all__ = ["corrected_interval", "difference_rows", "plan", "repeat", "summarise", "summary_markdown"]

_PROMISES = (
    ("sparsity", "pruned", "sparsity of the prunable weights", "share", min),
    ("sparsity_of_model", "pruned", "sparsity of all parameters", "share", min),
    ("parameters_active", "ratios", "live parameters, pruned / baseline", "number", max),
    ("training_state_bytes", "ratios", "training state, pruned / baseline", "number", max),
    ("memory_bytes_tensors", "ratios", "peak of tensors, pruned / baseline", "number", max),
    ("memory_bytes_last", "ratios", "memory of the last steps, pruned / baseline", "number", max),
    ("flops_per_step_last", "ratios", "FLOPs of the last step, pruned / baseline", "number", max),
    ("flops_total", "ratios", "FLOPs of the whole training, pruned / baseline", "number", max),
    ("step_seconds_last_to_dense", "ratios", "step time, pruned / dense twin", "number", max),
    ("step_seconds_last", "ratios", "step time, pruned / baseline", "number", max),
    ("train_seconds", "ratios", "training time, pruned / baseline", "number", max),
)


def corrected_interval(
    differences: list[float],
    test_rows: float,
    train_rows: float,
    level: float = 0.95,
    *,
    lower_is_better: bool = False,
) -> dict[str, float | None]:
    """Mean of paired differences and its corrected-resampled interval (Nadeau and Bengio 2003, section 3).

    Runs that share training rows are not independent, so the variance of the mean of J differences with
    sample variance s^2 is taken as ``(1/J + n_test/n_train) s^2``, and Student's t has J - 1 degrees of
    freedom. ``low`` and ``high`` bound the two-sided interval of ``level``; ``low_one_sided`` is the
    one-sided lower bound of the same level. Where ``lower_is_better``, ``high_one_sided``, the upper one,
    takes its place. With a single run the bounds are None. ValueError for no run or no rows."""
    runs = len(differences)
    if runs < 1:
        raise ValueError("expected at least one difference, got none")
    if test_rows <= 0 or train_rows <= 0:
        raise ValueError(f"expected positive row counts, got {test_rows} test and {train_rows} training rows")
    mean = sum(differences) / runs
    bound = "high_one_sided" if lower_is_better else "low_one_sided"
    if runs == 1:
        return {"mean": mean, "standard_error": None, "low": None, "high": None, bound: None}
    from scipy.stats import t

    variance = sum((d - mean) ** 2 for d in differences) / (runs - 1)
    error = math.sqrt((1 / runs + test_rows / train_rows) * variance)
    two_sided, one_sided = (float(t.ppf(p, runs - 1)) for p in ((1 + level) / 2, level))
    return {
        "mean": mean,
        "standard_error": error,
        "low": mean - two_sided * error,
        "high": mean + two_sided * error,
        bound: mean + one_sided * error if lower_is_better else mean - one_sided * error,
    }


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


def summarise(reports: dict[str, dict[str, Any]], planned: int) -> dict[str, Any]:
    """The content of ``summary.json`` from the finished runs' reports, by folder name."""
    runs = list(reports.values())
    sizes = [report["baseline"]["data"]["sizes"] for report in runs]
    train_rows = sum(s[0] for s in sizes) / len(sizes)
    test_rows = sum(s[2] for s in sizes) / len(sizes)
    differences: dict[str, Any] = {}
    metrics = get_task(runs[0]["task"]).metrics
    for metric in metrics:
        pairs = [(report["baseline"][metric.key], report["pruned"][metric.key]) for report in runs]
        found = corrected_interval(
            [p - b for b, p in pairs], test_rows, train_rows, lower_is_better=metric.lower_is_better
        )
        differences[metric.key] = {
            "baseline_mean": sum(b for b, _ in pairs) / len(pairs),
            "pruned_mean": sum(p for _, p in pairs) / len(pairs),
            **found,
        }
    promises = {}
    for key, part, label, kind, worst in _PROMISES:
        values = {
            name: report[part].get(key)
            for name, report in reports.items()
            if report[part].get(key) is not None
        }
        if values:
            at = worst(values, key=lambda name: values[name])
            promises[f"{part}.{key}"] = {
                "label": label,
                "kind": kind,
                "mean": sum(values.values()) / len(values),
                "min": min(values.values()),
                "max": max(values.values()),
                "worst": values[at],
                "worst_run": at,
            }
    targeted = runs[0]["config"]["target_sparsity"] is not None
    missed = [name for name, report in reports.items() if targeted and not report["pruned"]["target_reached"]]
    return {
        "task": runs[0]["task"],
        "runs": len(runs),
        "runs_planned": planned,
        "complete": len(runs) == planned,
        "train_rows": train_rows,
        "test_rows": test_rows,
        "differences": differences,
        "target_reached_in_all": not missed,
        "target_missed_in": missed,
        "promises": promises,
        "config": {k: v for k, v in runs[0]["config"].items() if k not in ("seed", "fold")},
        "environment": runs[0]["environment"],
        "data": {key: value for key, value in data_of(runs[0]).items() if key in ("copy", "note")},
        "each": {
            name: {
                **{m.name: [report["baseline"][m.key], report["pruned"][m.key]] for m in metrics},
                "epochs": [report["baseline"]["epochs"], report["pruned"]["epochs"]],
                "sparsity": report["pruned"]["sparsity"],
                "target_reached": report["pruned"]["target_reached"],
                "ratios": report["ratios"],
            }
            for name, report in reports.items()
        },
    }


def difference_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """``(metric, baseline, pruned, difference, two-sided interval, one-sided bound)`` lines of a summary."""
    rows = []
    for metric in get_task(summary["task"]).metrics:
        found, kind = summary["differences"][metric.key], difference_kind(metric.unit)
        low, high, bound = (shown(found[k], kind) for k in ("low", "high", metric.one_sided))
        rows.append(
            (
                on_copy(f"test {metric.label}", summary["data"]),
                shown(found["baseline_mean"], metric.unit),
                shown(found["pruned_mean"], metric.unit),
                shown(found["mean"], kind),
                "-" if found["low"] is None else f"{low} to {high}",
                bound,
            )
        )
    return rows


def summary_markdown(summary: dict[str, Any]) -> str:
    """``summary.md``: differences with their intervals, then each promise with its worst run."""
    metrics = get_task(summary["task"]).metrics
    side = "upper" if metrics[0].lower_is_better else "lower"
    difference = "difference (points)" if metrics[0].unit == "share" else "difference"
    lines = [
        f"# dynaprune compare {summary['task']}: {summary['runs']} of {summary['runs_planned']} runs",
        "",
        f"| | baseline | pruned | {difference} | 95 % interval, two-sided | one-sided {side} bound |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in difference_rows(summary)]
    if note := summary["data"].get("note"):
        lines += ["", f"**{note}**"]
    ratio = summary["test_rows"] / summary["train_rows"]
    lines += [
        "",
        "Differences are pruned - baseline, paired by run. The interval is the corrected-resampled one",
        f"(Nadeau, Bengio 2003): variance factor 1/J + n_test/n_train = 1/{summary['runs']} + {ratio:.3f};",
        "Student's t with J - 1 degrees of freedom; n_train is the part the weights were fitted on (without",
        "the validation part).",
        f"The one-sided {side} bound holds with 95 % too.",
        "",
        "| | mean | least | most | worst | in |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for promise in summary["promises"].values():
        kind = promise["kind"]
        values = [
            shown(promise[k], kind) if kind == "share" else f"{promise[k]:.3f}"
            for k in ("mean", "min", "max", "worst")
        ]
        lines.append(f"| {promise['label']} | {' | '.join(values)} | {promise['worst_run']} |")
    reached = (
        "in every run"
        if summary["target_reached_in_all"]
        else f"not in {', '.join(summary['target_missed_in'])}"
    )
    lines += ["", f"Target sparsity reached: {reached}.", ""]
    return "\n".join(lines)


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
            summary = summarise({n: reports[n] for n, _ in runs if n in reports}, len(runs))
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
