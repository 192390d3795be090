"""The summary over seeds and folds: paired differences of the arms, with intervals, and what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynaprune.experiment.paired import of_rows, of_runs, resampled
from dynaprune.experiment.report import data_of
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.tasks.metric import Metric

__all__ = ["RowsOfRuns", "arm_of", "summarise"]

# Of each run, of each arm: what every test row adds to a metric, by the metric's key.
RowsOfRuns = Mapping[str, Mapping[str, Mapping[str, Any]]]

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


def arm_of(report: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The result of an arm or control in a report; None where it has none."""
    found: dict[str, Any] | None = report.get(name) or report.get("controls", {}).get(name)
    return found


def summarise(
    reports: dict[str, dict[str, Any]], planned: int, rows: RowsOfRuns | None = None
) -> dict[str, Any]:
    """The content of ``summary.json`` from the finished runs' reports, by folder name."""
    runs = list(reports.values())
    task = get_task(runs[0]["task"])
    sizes = [report["baseline"]["data"]["sizes"] for report in runs]
    pair = _Pair(reports, rows or {}, resampled(task.fixed_test, runs[0]["config"]), sizes)
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
        "train_rows": pair.rows_of_parts[0],
        "test_rows": pair.rows_of_parts[1],
        "interval": "corrected" if pair.resampled else "t",
        "differences": {metric.key: pair.difference(metric, "baseline") for metric in task.metrics},
        **_controls(pair, task.metrics),
        "target_reached_in_all": not missed,
        "target_missed_in": missed,
        "promises": promises,
        "config": {k: v for k, v in runs[0]["config"].items() if k not in ("seed", "fold")},
        "environment": runs[0]["environment"],
        "data": {key: value for key, value in data_of(runs[0]).items() if key in ("copy", "note")},
        "each": {
            name: {
                **{m.name: [report["baseline"][m.key], report["pruned"][m.key]] for m in task.metrics},
                "epochs": [report["baseline"]["epochs"], report["pruned"]["epochs"]],
                "sparsity": report["pruned"]["sparsity"],
                "target_reached": report["pruned"]["target_reached"],
                "ratios": report["ratios"],
            }
            for name, report in reports.items()
        },
    }


class _Pair:
    """Runs in which the pruned arm is set beside another one."""

    def __init__(
        self,
        reports: Mapping[str, dict[str, Any]],
        rows: RowsOfRuns,
        resampled: bool,
        sizes: Sequence[Sequence[int]],
    ) -> None:
        self.reports, self.rows, self.resampled = reports, rows, resampled
        self.rows_of_parts = (
            sum(s[0] for s in sizes) / len(sizes),
            sum(s[2] for s in sizes) / len(sizes),
        )

    def difference(self, metric: Metric, other: str) -> dict[str, Any]:
        """Means of ``other`` and of the pruned arm over the runs that have both, and pruned - other."""
        pairs = {
            name: (found[metric.key], report["pruned"][metric.key])
            for name, report in self.reports.items()
            if (found := arm_of(report, other)) is not None
        }
        differences = [pruned - value for value, pruned in pairs.values()]
        found = of_runs(
            differences,
            self.rows_of_parts,
            resampled=self.resampled,
            lower_is_better=metric.lower_is_better,
        )
        return {
            f"{other}_mean": sum(value for value, _ in pairs.values()) / len(pairs),
            "pruned_mean": sum(pruned for _, pruned in pairs.values()) / len(pairs),
            **found,
            "over_rows": None if self.resampled else of_rows(self._rows(list(pairs), metric, other)),
        }

    def _rows(self, names: Sequence[str], metric: Metric, other: str) -> list[tuple[Any, Any]]:
        of_runs = (self.rows.get(name, {}) for name in names)
        return [tuple(arms.get(arm, {}).get(metric.key) for arm in (other, "pruned")) for arms in of_runs]  # type: ignore[misc]

    def ratio(self, key: str, other: str) -> float | None:
        """Mean over the runs of what ``other`` costs, relative to the baseline."""
        ratios = [
            found[key] / report["baseline"][key]
            for report in self.reports.values()
            if (found := arm_of(report, other)) is not None
            and found.get(key) is not None
            and report["baseline"].get(key)
        ]
        return sum(ratios) / len(ratios) if ratios else None


def _controls(pair: _Pair, metrics: Sequence[Metric]) -> dict[str, Any]:
    names = dict.fromkeys(name for report in pair.reports.values() for name in report.get("controls", {}))
    if not names:
        return {}
    return {
        "controls": {
            name: {
                "runs": sum(arm_of(report, name) is not None for report in pair.reports.values()),
                "differences": {metric.key: pair.difference(metric, name) for metric in metrics},
                "flops_total": pair.ratio("flops_total", name),
                "train_seconds": pair.ratio("train_seconds", name),
            }
            for name in names
        }
    }
