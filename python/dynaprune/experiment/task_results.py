"""The finished runs of each task, read from the folders that ``dynaprune compare`` has written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaprune.experiment.arm_times import add_times
from dynaprune.experiment.figure_text import difference_kind, shown
from dynaprune.experiment.memory_figures import KINDS
from dynaprune.experiment.paired import of_rows, of_runs, resampled
from dynaprune.experiment.report import OF_A_MACHINE, ratios, scores_of
from dynaprune.experiment.saved_results import OF_A_RUN, check_report, is_number, read_json
from dynaprune.experiment.summary import arm_of
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.tasks.metric import KNOWN, Metric
from dynaprune.experiment.test_rows import read_test_rows

__all__ = ["Figure", "Run", "TaskResults", "read_results"]

_RUN_FOLDER = re.compile(r"seed-\d+(-fold-\d+)?")
_SCORE = re.compile(r"test_[a-z0-9_]{1,40}")
_OF_CONTROLS = ("train_seconds", "seconds_alone", "memory_bytes_tensors", "flops_total", "step_seconds_last")
_OF_BOTH = ("weights", "gradients", "optimizer", "activations", "temporaries")
# key, label, kind, how the pruned arm is set beside the baseline (None: it has no counterpart there)
_FIGURES = (
    ("train_seconds", "training time", "seconds", "ratio"),
    ("seconds_alone", "training time, steps measured alone", "seconds", "ratio"),
    ("peak_memory_bytes", "peak memory of the process", "bytes", "ratio"),
    ("memory_bytes_last", "peak memory in the last 20 steps", "bytes", "ratio"),
    ("memory_bytes_process", "peak memory of the process beyond what it held before", "bytes", "ratio"),
    ("memory_bytes_tensors", "peak of tensors in a step", "bytes", "ratio"),
    *((f"memory_bytes_{kind}", f"{KINDS[kind]} at that peak", "bytes", "ratio") for kind in _OF_BOTH),
    ("memory_bytes_tensors_last", "peak of tensors in a step, last structure", "bytes", "ratio"),
    ("training_state_bytes", "weights + gradients + optimizer state", "bytes", "ratio"),
    ("parameters_active", "active parameters", "count", "ratio"),
    ("flops_per_step_last", "FLOPs of the last step", "flops", "ratio"),
    ("flops_total", "FLOPs of the whole training", "flops", "ratio"),
    ("step_seconds_last", "step time", "time", "ratio"),
    ("sparsity", "sparsity of the prunable weights", "share", None),
    ("sparsity_of_model", "sparsity of all parameters", "share", None),
)


@dataclass(frozen=True)
class Run:
    """One finished comparison: where it was read from, and its checked report."""

    path: Path
    report: dict[str, Any]

    @property
    def key(self) -> tuple[int, int | None]:
        """Seed and fold."""
        return self.report["config"]["seed"], self.report["config"].get("fold")


@dataclass(frozen=True)
class Figure:
    """One line of the table for one task: ``interval`` is that of `of_runs`.

    ``of`` is baseline, pruned, difference (pruned - baseline), the same over test rows, ratio (pruned /
    baseline) or dense twin; or a control's name, "pruned - NAME", the same over test rows, or "ratio of NAME"
    (NAME / baseline). ``kind`` is one of the kinds of `figure_text.shown`."""

    label: str
    of: str
    kind: str
    interval: dict[str, float | None]

    @property
    def text(self) -> str:
        """Mean and interval for people; a single run's figure says that it has none."""
        mean, low, high = (self.interval[k] for k in ("mean", "low", "high"))
        bounds = "no interval" if low is None else f"{_number(low, self.kind)} to {_number(high, self.kind)}"
        return f"{_number(mean, self.kind)} ({bounds})"


@dataclass(frozen=True)
class TaskResults:
    """The finished runs of one task, all with the same settings."""

    task: str
    runs: tuple[Run, ...]

    @property
    def rows(self) -> tuple[float, float]:
        """Mean numbers of training and test rows."""
        sizes = [run.report["baseline"]["data"]["sizes"] for run in self.runs]
        return sum(s[0] for s in sizes) / len(sizes), sum(s[2] for s in sizes) / len(sizes)

    @property
    def resampled(self) -> bool:
        """Whether each run has a test part of its own."""
        return resampled(get_task(self.task).fixed_test, self.runs[0].report["config"])

    @property
    def controls(self) -> list[str]:
        """The controls of any run."""
        return list(dict.fromkeys(name for run in self.runs for name in run.report.get("controls", {})))

    def figures(self) -> list[Figure]:
        """Every figure that all runs of the task have."""
        found: list[Figure] = []
        for key in self._scores():
            metric = KNOWN.get(key) or Metric(key, key.removeprefix("test_").replace("_", " "))
            self._add(found, f"test {metric.label}", metric.unit, key, "difference")
        for key, label, kind, compared in _FIGURES:
            self._add(found, label, kind, key, compared)
            if key == "step_seconds_last":
                self._one(found, label, "dense twin", "time", lambda r: r["pruned"].get("step_seconds_dense"))
                self._one(
                    found,
                    label,
                    "ratio to the dense twin",
                    "ratio",
                    lambda r: ratios(r["baseline"], r["pruned"]).get("step_seconds_last_to_dense"),
                )
        return found

    def _scores(self) -> list[str]:
        """The test scores of both arms, those of every run of the task first; the loss is no score."""
        keys = {key for key in self.runs[0].report["baseline"] if _SCORE.fullmatch(key)}
        always = scores_of(self.task)
        return [*always, *sorted(keys - {*always, "test_loss"})]

    def _add(self, found: list[Figure], label: str, kind: str, key: str, compared: str | None) -> None:
        if compared is not None:
            self._one(found, label, "baseline", kind, lambda r: r["baseline"].get(key))
        self._one(found, label, "pruned", kind, lambda r: r["pruned"].get(key))
        if compared == "difference":
            self._differences(found, label, difference_kind(kind), key, "baseline", "difference")
        elif compared == "ratio":
            self._one(found, label, "ratio", "ratio", lambda r: ratios(r["baseline"], r["pruned"]).get(key))
        for name in self.controls if key in _OF_CONTROLS or compared == "difference" else ():
            self._control(found, label, kind, key, compared, name)

    def _control(
        self, found: list[Figure], label: str, kind: str, key: str, compared: str | None, name: str
    ) -> None:
        self._one(found, label, name, kind, lambda r: (arm_of(r, name) or {}).get(key))
        if compared == "difference":
            self._differences(found, label, difference_kind(kind), key, name, f"pruned - {name}")
        else:
            of = f"ratio of {name}"
            self._one(found, label, of, "ratio", lambda r: ratios(r["baseline"], arm_of(r, name)).get(key))

    def _differences(self, found: list[Figure], label: str, kind: str, key: str, other: str, of: str) -> None:
        self._one(found, label, of, kind, lambda r: _difference(r, key, other))
        if self.resampled or not all(is_number(_difference(run.report, key, other)) for run in self.runs):
            return
        rows = [
            tuple(read_test_rows(run.path / arm).get(key) for arm in (other, "pruned")) for run in self.runs
        ]
        over_rows = of_rows(rows)  # type: ignore[arg-type]
        if over_rows is not None:
            found.append(Figure(label, f"{of} over test rows", kind, dict(over_rows)))

    def _one(
        self, found: list[Figure], label: str, of: str, kind: str, value: Callable[[dict[str, Any]], Any]
    ) -> None:
        values = [value(run.report) for run in self.runs]
        if all(is_number(v) for v in values):
            numbers = [float(v) for v in values]
            found.append(Figure(label, of, kind, of_runs(numbers, self.rows, resampled=self.resampled)))


def _difference(report: dict[str, Any], key: str, other: str) -> float | None:
    value, pruned = (arm_of(report, other) or {}).get(key), report["pruned"].get(key)
    return pruned - value if is_number(pruned) and is_number(value) else None


def _number(value: float | None, kind: str) -> str:
    assert value is not None
    return shown(round(value) if kind == "count" else value, kind)


def _unfinished(path: Path) -> str | None:
    """Why the run in folder ``path`` is not finished; None where it is."""
    if not (path / "report.json").is_file():
        return "no report.json"
    report = read_json(path / "report.json")
    if report.get("interrupted") is not False:
        return "interrupted"
    return None


def _runs_of(folder: Path) -> list[Path]:
    """The folders of the runs in ``folder``, all of them finished; ValueError that says which are not."""
    if not folder.is_dir():
        raise ValueError(f"expected a folder written by dynaprune compare, and {folder} is none")
    if (folder / "report.json").is_file():
        runs, planned = [folder], 1
    else:
        runs = sorted(p for p in folder.iterdir() if p.is_dir() and _RUN_FOLDER.fullmatch(p.name))
        planned = len(runs)
        if (folder / "summary.json").is_file():
            stated = read_json(folder / "summary.json").get("runs_planned")
            if type(stated) is not int or stated < 1:
                raise ValueError(f"{folder / 'summary.json'}: expected runs_planned to be a whole number")
            planned = stated
    reasons = {run: _unfinished(run) for run in runs}
    if all(reasons.values()):
        raise ValueError(f"{folder} holds no finished run of dynaprune compare")
    missing = [f"{run.name} ({reason})" for run, reason in reasons.items() if reason]
    if planned > len(runs):
        missing.append(f"{planned - len(runs)} of {planned} planned runs not begun")
    elif len(runs) > 1 and not (folder / "summary.json").is_file():
        missing.append("no summary.json")
    if missing:
        raise ValueError(
            f"{folder} holds unfinished runs: {', '.join(missing)}; the same compare command finishes them"
        )
    return runs


def _same_settings(first: Run, other: Run) -> None:
    """ValueError that says what differs, unless both runs may stand in one row."""

    def differing(part: str, keys: Sequence[str]) -> list[str]:
        a, b = first.report[part], other.report[part]
        return [f"{k} {a.get(k)!r} and {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]

    settings = sorted({*first.report["config"], *other.report["config"]} - set(OF_A_RUN))
    for kind, different in (
        ("settings", differing("config", settings)),
        ("machines", differing("environment", OF_A_MACHINE)),
    ):
        if different:
            raise ValueError(
                f"{first.path} and {other.path} are runs of {first.report['task']} with different {kind},"
                f" which cannot share a column: {'; '.join(different)}. Make a table of each."
            )


def read_results(folders: Sequence[Path]) -> list[TaskResults]:
    """The runs of every task, in the order in which the tasks come first in ``folders``.

    A folder is that of one comparison (``report.json``) or of a repeated one (``summary.json`` and one
    folder per run). Several folders of one task are joined. ValueError for a folder without a finished run,
    for unfinished runs (named), damaged or foreign files, runs of one task that differ in more than seed and
    fold or come from different machines, and a run given twice."""
    if not folders:
        raise ValueError("expected at least one folder, got none")
    found: dict[str, dict[tuple[int, int | None], Run]] = {}
    for folder in folders:
        for path in _runs_of(Path(folder)):
            report = read_json(path / "report.json")
            check_report(path / "report.json", report, ("train_seconds", "parameters_active"))
            add_times(report, path)
            run = Run(path, report)
            runs = found.setdefault(report["task"], {})
            if runs:
                _same_settings(next(iter(runs.values())), run)
            if run.key in runs:
                seed, fold = run.key
                place = f"seed {seed}" + ("" if fold is None else f", fold {fold}")
                both = f"{runs[run.key].path} and {path}"
                raise ValueError(f"{both} are the same run of {report['task']}: {place}")
            runs[run.key] = run
    return [TaskResults(task, tuple(runs.values())) for task, runs in found.items()]
