"""``curves.png``: loss, quality, cost and size of both arms over the epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from dynaprune.experiment.pictures.style import ACCENT, COLOURS, PAPER, heading
from dynaprune.experiment.report import data_of
from dynaprune.experiment.tasks import get_task
from dynaprune.experiment.tasks.metric import Metric, beside_the_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_curves"]


def _columns(rows: list[dict[str, str]], arm: str, *names: str) -> list[np.ndarray]:
    chosen = [row for row in rows if row["arm"] == arm]
    return [np.array([float(row[name] or "nan") for row in chosen]) for name in names]


def _lines(
    axes: Axes, rows: list[dict[str, str]], name: str, title: str, scale: float = 1.0, floor: bool = False
) -> None:
    """One line per arm over the epochs, named at its end, with a dot at the epoch whose weights were kept."""
    axes.set_title(title)
    ends = []
    for arm, colour in COLOURS.items():
        epochs, values = _columns(rows, arm, "epoch", name)
        if not len(epochs):
            continue
        values = values * scale
        axes.plot(epochs, values, color=colour)
        best = [i for i, row in enumerate(r for r in rows if r["arm"] == arm) if row["best"] == "True"]
        if best:
            axes.plot(
                epochs[best[-1]], values[best[-1]], "o", color=colour, ms=7, mec=PAPER, mew=1.6, zorder=4
            )
        ends.append((epochs[-1], values[-1], arm))
    axes.margins(x=0.02)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    if floor:
        axes.set_ylim(bottom=0)
    low, high = axes.get_ylim()
    near = (
        len(ends) == 2
        and abs(ends[0][1] - ends[1][1]) < 0.06 * (high - low)
        and abs(ends[0][0] - ends[1][0]) < 2
    )
    for number, (x, y, arm) in enumerate(sorted(ends, key=lambda e: e[1])):
        shift = (-7 if number == 0 else 7) if near else 0
        axes.annotate(
            arm,
            (x, y),
            (7, shift),
            textcoords="offset points",
            color=COLOURS[arm],
            fontsize=9,
            va="center",
            weight="bold",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
        )


def draw_curves(rows: list[dict[str, str]], report: dict[str, Any]) -> Figure:
    """Loss, quality, cost and size over the epochs, both arms; ``rows`` are those of ``history.csv``."""
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 6.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.18, h_pad=0.14)  # type: ignore[union-attr, call-arg]
    _lines(panels[0, 0], rows, "validation_loss", "validation loss", floor=True)
    metric = beside_the_loss(get_task(report["task"]).metrics)
    scale, unit = (100, " (%)") if metric.unit == "share" else (1, "")
    _lines(panels[0, 1], rows, f"validation_{metric.name}", f"validation {metric.label}{unit}", scale)
    _lines(panels[1, 0], rows, "flops_per_step", "MFLOP per training step", 1e-6, floor=True)
    _lines(panels[1, 1], rows, "parameters_active", "live parameters (thousands)", 1e-3, floor=True)
    reached = _first_at_target(rows, report)
    if reached is not None:
        for axes in panels.flat:
            axes.axvline(reached, color=ACCENT, lw=1, ls=(0, (2, 3)), zorder=1)
        panels[1, 1].annotate(
            "target reached",
            (reached, 0.5),
            (6, 0),
            xycoords=panels[1, 1].get_xaxis_transform(),
            textcoords="offset points",
            color=ACCENT,
            fontsize=9,
            va="center",
        )
    heading(figure, f"{report['task']}: a network that shrinks while it trains", _verdict(report))
    return figure


def _first_at_target(rows: list[dict[str, str]], report: dict[str, Any]) -> float | None:
    if report["config"]["target_sparsity"] is None:
        return None
    there = [
        float(row["epoch"]) for row in rows if row["arm"] == "pruned" and row["target_reached"] == "True"
    ]
    return there[0] if there else None


def _brief(metric: Metric, arm: dict[str, Any]) -> str:
    value = arm[metric.key]
    return f"{100 * value:.1f} %" if metric.unit == "share" else f"{value:.3f}"


def _verdict(report: dict[str, Any]) -> str:
    baseline, pruned, metric = report["baseline"], report["pruned"], get_task(report["task"]).metrics[0]
    parts = []
    if copy := data_of(report).get("copy"):
        parts.append(copy)
    if baseline:
        parts.append(f"test {metric.label} {_brief(metric, baseline)} dense")
    if pruned:
        sizes = f"{100 * pruned['sparsity']:.0f} % sparsity"
        if "sparsity_of_model" in pruned:
            sizes += f" ({100 * pruned['sparsity_of_model']:.0f} % of all parameters)"
        parts.append(f"{_brief(metric, pruned)} pruned at {sizes}")
    flops = report["ratios"].get("flops_per_step_last")
    if flops is not None:
        parts.append(f"last step at {100 * flops:.0f} % of the FLOPs")
    return ",  ".join(parts) + ".   dots: the weights that were kept" if parts else ""
