"""A chart for papers and pages: quality over what a whole training costs, one point per arm and run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from dynaprune.experiment.pictures import save_figure
from dynaprune.experiment.pictures.style import COLOURS, COLOURS_OF_CONTROLS, STYLE, heading
from dynaprune.experiment.summary import arm_of
from dynaprune.experiment.task_results import TaskResults
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.tasks.metric import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_costs", "write_costs"]

_FLOPS = ("flops_total", "FLOPs of the whole training, relative to the baseline of the same run")
_CLOCK = ("train_seconds", "training time by the clock, relative to the baseline of the same run")
_ALONE = ("seconds_alone", "training time, steps measured alone, relative to the baseline")


def write_costs(path: Path, results: Sequence[TaskResults]) -> None:
    """Draw the chart into the PNG file ``path``.

    OSError: a file that cannot be written."""
    with plt.rc_context(STYLE):
        save_figure(draw_costs(results), path)


def draw_costs(results: Sequence[TaskResults]) -> Figure:
    """A row for each task, one panel over FLOPs and one over time (by ``times.json`` where all runs have it);
    the mean of an arm is the larger dot."""
    size = (10.5, 3.7 * len(results))
    figure, panels = plt.subplots(len(results), 2, figsize=size, layout="constrained", squeeze=False)
    for row, each in zip(panels, results, strict=True):
        metric = get_task(each.task).metrics[0]
        colours = {**COLOURS, **dict(zip(each.controls, COLOURS_OF_CONTROLS, strict=False))}
        time = _ALONE if all("seconds_alone" in run.report["baseline"] for run in each.runs) else _CLOCK
        for axes, (cost, label) in zip(row, (_FLOPS, time), strict=True):
            _points(axes, each, metric, cost, colours)
            axes.set_title(f"{each.task}: test {metric.label}" + (" (%)" if metric.unit == "share" else ""))
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
        row[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    heading(figure, "Quality over cost", "small dots: runs,  large dots: their mean")
    return figure


def _points(axes: Axes, results: TaskResults, metric: Metric, cost: str, colours: dict[str, str]) -> None:
    scale = 100 if metric.unit == "share" else 1
    for name in ("baseline", "pruned", *results.controls):
        points = [
            (arm[cost] / run.report["baseline"][cost], scale * arm[metric.key])
            for run in results.runs
            if (arm := arm_of(run.report, name)) is not None and _has_both(arm, run.report["baseline"], cost)
        ]
        if not points:
            continue
        colour = colours.get(name, "#4a4a4a")
        axes.plot(*zip(*points, strict=True), "o", ms=4, color=colour, alpha=0.55)
        mean = [sum(values) / len(points) for values in zip(*points, strict=True)]
        axes.plot(*mean, "o", ms=9, color=colour, label=name, zorder=4)


def _has_both(arm: dict[str, Any], baseline: dict[str, Any], cost: str) -> bool:
    return arm.get(cost) is not None and bool(baseline.get(cost))
