"""A summary over seeds and folds for people: its tables, and ``summary.md``."""

from __future__ import annotations

from typing import Any

from dynaprune.experiment.figure_text import difference_kind, shown
from dynaprune.experiment.report_text import on_copy
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.tasks.metric import Metric

__all__ = ["INTERVALS", "control_rows", "difference_rows", "summary_markdown"]

INTERVALS = {
    "t": "Student's t over the paired differences of the runs, J - 1 degrees of freedom: the test part is "
    "the same in all",
    "corrected": "corrected-resampled (Nadeau, Bengio 2003), for test parts that are drawn anew: variance "
    "factor 1/J + n_test/n_train for J runs, Student's t with J - 1 degrees of freedom; n_train is the part "
    "the weights were fitted on",
}
OVER_ROWS = (
    "Over test rows: the percentile bootstrap over the rows of the test part, 10,000 resamples, a row with "
    "its differences of all runs. It takes the trained networks as they are, the other interval the rows."
)


def _between(found: dict[str, Any] | None, kind: str) -> str:
    if found is None or found["low"] is None:
        return "-"
    return f"{shown(found['low'], kind)} to {shown(found['high'], kind)}"


def _cells(metric: Metric, found: dict[str, Any], other: str) -> tuple[str, str, str, str, str, str]:
    kind = difference_kind(metric.unit)
    return (
        shown(found[f"{other}_mean"], metric.unit),
        shown(found["pruned_mean"], metric.unit),
        shown(found["mean"], kind),
        _between(found, kind),
        _between(found.get("over_rows"), kind),
        shown(found[metric.one_sided], kind),
    )


def difference_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """``(metric, baseline, pruned, difference, two-sided interval, that over test rows, one-sided bound)``
    lines of a summary."""
    return [
        (
            on_copy(f"test {metric.label}", summary["data"]),
            *_cells(metric, summary["differences"][metric.key], "baseline"),
        )
        for metric in get_task(summary["task"]).metrics
    ]


def control_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """``(control, FLOPs and time relative to the baseline, metric, control, pruned, difference, intervals,
    bound)`` lines of a summary."""
    return [
        (
            name if number == 0 else "",
            shown(control["flops_total"], "ratio") if number == 0 else "",
            shown(control["train_seconds"], "ratio") if number == 0 else "",
            f"test {metric.label}",
            *_cells(metric, control["differences"][metric.key], name),
        )
        for name, control in summary.get("controls", {}).items()
        for number, metric in enumerate(get_task(summary["task"]).metrics)
    ]


def summary_markdown(summary: dict[str, Any]) -> str:
    """``summary.md``: differences with their intervals, then each promise with its worst run."""
    metrics = get_task(summary["task"]).metrics
    side = "upper" if metrics[0].lower_is_better else "lower"
    difference = "difference (points)" if metrics[0].unit == "share" else "difference"
    columns = f"{difference} | 95 % interval, two-sided | over test rows | one-sided {side} bound |"
    lines = [
        f"# dynaprune compare {summary['task']}: {summary['runs']} of {summary['runs_planned']} runs",
        "",
        f"| | baseline | pruned | {columns}",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in difference_rows(summary)]
    if note := summary["data"].get("note"):
        lines += ["", f"**{note}**"]
    lines += [
        "",
        "Differences are pruned - baseline, paired by run.",
        f"The interval is {INTERVALS[summary['interval']]}.",
    ]
    if summary["interval"] == "corrected":
        ratio = summary["test_rows"] / summary["train_rows"]
        lines.append(f"Here the factor is 1/{summary['runs']} + {ratio:.3f}.")
    else:
        lines.append(OVER_ROWS)
    lines += [f"The one-sided {side} bound holds with 95 % too.", ""]
    if rows := control_rows(summary):
        lines += [
            "## Controls",
            "",
            f"| | FLOPs / baseline | time / baseline | | control | pruned | {columns}",
            "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
            *[f"| {' | '.join(row)} |" for row in rows],
            "",
            "Differences are pruned - control, paired by run. FLOPs and time are of the whole training.",
            "",
        ]
    lines += ["| | mean | least | most | worst | in |", "|---|---:|---:|---:|---:|---|"]
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
