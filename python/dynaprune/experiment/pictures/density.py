"""``density.png``: the share of live weights, layer by time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from dynaprune.experiment.pictures.style import ACCENT, COLOURS, LIFE, PAPER, heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_density"]


def draw_density(path: Path, steps: float, report: dict[str, Any]) -> Figure:
    """Share of live weights, layer by layer (rows) over the training steps, from ``density.csv``."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    layers = [name for name in rows[0] if name not in ("step", "sparsity")]
    at = np.array([float(row["step"]) for row in rows])
    edges = np.append(at, max(steps, at[-1] + 1))
    image = np.array([[float(row[name]) for row in rows] for name in layers])
    overall = 1 - np.array([float(row["sparsity"]) for row in rows])
    per_epoch = steps / max(1, report["pruned"]["epochs"]) if report["pruned"] else 1.0
    edges = edges / per_epoch

    figure, (top, panel) = plt.subplots(
        2,
        1,
        figsize=(10.5, 2.6 + 0.55 * len(layers)),
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": [1.3, 0.5 * len(layers) + 0.3]},
    )
    top.stairs(100 * overall, edges, baseline=0, fill=True, color=LIFE(0.35), lw=0)
    top.stairs(100 * overall, edges, baseline=None, color=COLOURS["pruned"], lw=1.6)
    top.plot(edges[1:-1], np.full(len(edges) - 2, -9.0), "|", color=ACCENT, ms=5, clip_on=False)
    top.set_ylim(0, 104)
    top.set_title("live weights of all prunable layers (%);  ticks: the structure changed")
    top.tick_params(bottom=False)
    panel.grid(False)
    mesh = panel.pcolormesh(
        edges,
        np.arange(len(layers) + 1),
        image,
        cmap=LIFE,
        vmin=0,
        vmax=1,
        edgecolors="none",
        rasterized=True,
    )
    panel.hlines(np.arange(1, len(layers)), edges[0], edges[-1], color=PAPER, lw=3)
    panel.set_yticks(np.arange(len(layers)) + 0.5, [_layer_label(n, path.parent) for n in layers])
    panel.tick_params(length=0)
    panel.invert_yaxis()
    panel.set_xlabel("epoch")
    panel.set_xlim(edges[0], edges[-1])
    panel.set_title("by layer")
    for spine in panel.spines.values():
        spine.set_visible(False)
    for number, value in enumerate(image[:, -1]):
        panel.annotate(
            f"{100 * value:.1f} %",
            (1, number + 0.5),
            (8, 0),
            xycoords=panel.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
    bar = figure.colorbar(mesh, ax=[top, panel], shrink=0.6, pad=0.045, aspect=26, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", "50", "100 % live"])
    bar.outline.set_visible(False)
    heading(
        figure,
        f"{report['task']}: where the weights went",
        "share of live weights, layer by layer, while it trains",
    )
    return figure


def _layer_label(name: str, folder: Path) -> str:
    masks = folder / "masks.json"
    if masks.is_file():
        shape = json.loads(masks.read_text())["shapes"].get(name)
        if shape:
            return f"{name}   {shape[1]} → {shape[0]}"
    return name
