"""The experiment's table over tasks, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from dynaprune.experiment.figure_text import difference_kind
from dynaprune.experiment.saved_results import is_number
from dynaprune.experiment.summary_text import INTERVALS, OVER_ROWS
from dynaprune.experiment.task_results import Figure, TaskResults

__all__ = ["table_csv", "table_markdown"]


def _described(results: TaskResults) -> list[tuple[str, str]]:
    """What stands above the figures of a task."""
    config, runs = results.runs[0].report["config"], results.runs
    seeds, folds = len({run.key[0] for run in runs}), len({run.key[1] for run in runs})
    count = f"{len(runs)}" + (f" ({folds} folds, seeds: {seeds})" if config.get("folds") else "")
    train, test = results.rows
    target = config.get("target_sparsity")
    reached = sum(run.report["pruned"].get("target_reached") is True for run in runs)
    return [
        ("runs", count),
        ("rows: training, test", f"{train:,.0f}, {test:,.0f}"),
        ("target sparsity", "self-paced" if not is_number(target) else f"{target:g}, reached in {reached}"),
    ]


def _notes(results: Sequence[TaskResults]) -> list[str]:
    """How to read the table, and where each task was measured."""
    notes = [
        "Means over the runs; in brackets the two-sided 95 % interval.",
        *_intervals(results),
        "Differences are pruned - baseline, ratios pruned / baseline, both paired by run; those of a control "
        "name it, and are pruned - control and control / baseline.",
        "The dense twin is the same network dense and without dropout, timed in turn with the pruned one.",
    ]
    single = [each.task for each in results if len(each.runs) == 1]
    if single:
        notes.append(f"No interval: a single run says nothing of the spread ({', '.join(single)}).")
    for each in results:
        environments = [run.report["environment"] for run in each.runs]
        first, versions = environments[0], [e.get("versions") for e in environments]
        torch = sorted({str(v.get("torch")) for v in versions if isinstance(v, dict)})
        where = f"{first.get('cpu')}, device {first.get('device')}, threads {first.get('threads')}"
        commits = sorted({str(e["commit"]) for e in environments if e.get("commit")})
        built = f", commit {', '.join(commits)}" if commits else ""
        notes.append(f"{each.task}: {where}, torch {', '.join(torch)}{built}.")
        if len(processors := sorted({str(e.get("cpu")) for e in environments})) > 1:
            notes.append(f"{each.task}: the runs are of {', '.join(processors)}; their times scatter more.")
        for run in each.runs:
            marks = run.report.get("marks")
            notes += [
                f"{each.task}, {run.path.name}: {m}" for m in (marks if isinstance(marks, list) else [])
            ]
        if note := _said_of_data(each, "note"):
            notes.append(f"{each.task}: {note}")
    return [f"- {_cell(note)}" for note in notes]


def _intervals(results: Sequence[TaskResults]) -> list[str]:
    """Which interval the figures of each task have."""
    kinds = {"corrected": [each for each in results if each.resampled]}
    kinds["t"] = [each for each in results if not each.resampled]
    said = [f"{', '.join(e.task for e in of)}: {INTERVALS[kind]}." for kind, of in kinds.items() if of]
    return [*said, *([OVER_ROWS] if kinds["t"] else [])]


def _said_of_data(results: TaskResults, key: str) -> str | None:
    """What the first run says of its data under ``key``, if it is text."""
    value = results.runs[0].report["baseline"]["data"].get(key)
    return value if isinstance(value, str) and value else None


def _heading(results: TaskResults) -> str:
    """The task, with the copy of its data where that is not the original."""
    copy = _said_of_data(results, "copy")
    return _cell(f"{results.task} ({copy})" if copy else results.task)


def _cell(text: str) -> str:
    """``text`` as it may stand in a Markdown table: what files hold cannot end a cell or a line."""
    return " ".join(text.replace("|", "\\|").split())


def table_markdown(results: Sequence[TaskResults]) -> str:
    """One column for each task, one line for each figure, then how to read it."""
    figures = {each.task: {(f.label, f.of): f for f in each.figures()} for each in results}
    lines = [f"| | {' | '.join(map(_heading, results))} |", f"|---|{'---:|' * len(results)}"]
    described = [dict(_described(each)) for each in results]
    for label in described[0]:
        lines.append(f"| {label} | {' | '.join(_cell(d[label]) for d in described)} |")
    for label, of in _lines(figures):
        cells = [
            found[label, of].text if (label, of) in found else "-"
            for found in (figures[e.task] for e in results)
        ]
        kind = next(found[label, of].kind for found in figures.values() if (label, of) in found)
        name = f"{label}, {of}" + (" in points" if kind == "points" else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_notes(results), ""])


def _lines(figures: dict[str, dict[tuple[str, str], Figure]]) -> list[tuple[str, str]]:
    """The lines of all tasks, each label's together, in the order of their first task."""
    every = list(dict.fromkeys(key for found in figures.values() for key in found))
    labels = list(dict.fromkeys(label for label, _ in every))
    return sorted(every, key=lambda key: labels.index(key[0]))


def table_csv(results: Sequence[TaskResults]) -> str:
    """One line for each figure of each task, in plain units (shares, seconds, bytes); a single run's bounds
    are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["task", "figure", "of", "unit", "runs", "mean", "low", "high"])
    units = {"time": "seconds", **{difference_kind(unit): unit for unit in ("share", "nats", "number")}}
    for each in results:
        for figure in each.figures():
            bounds = [
                "" if figure.interval[k] is None else figure.interval[k] for k in ("mean", "low", "high")
            ]
            unit = units.get(figure.kind, figure.kind)
            writer.writerow([each.task, figure.label, figure.of, unit, len(each.runs), *bounds])
    return buffer.getvalue()
