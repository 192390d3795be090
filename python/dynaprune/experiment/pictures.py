"""The three pictures of a run: ``curves.png``, ``density.png`` (layer by time) and ``masks.png``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dynaprune.experiment.report import data_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_all", "draw_curves", "draw_density", "draw_masks"]

PAPER, INK, SOFT, RULE = "#fbfaf6", "#1f2937", "#6b7280", "#e3e0d8"
COLOURS = {"baseline": "#9a9184", "pruned": "#0b7a75"}
ACCENT = "#d1603d"
_LIFE = LinearSegmentedColormap.from_list("life", ["#f1eee5", "#bfe0d2", "#5fb3a3", "#0b7a75", "#08324a"])
_WEIGHT = LinearSegmentedColormap.from_list("weight", ["#7cc5b4", "#0b7a75", "#08324a"])
_STYLE: dict[Any, Any] = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.labelsize": 9.5,
    "text.color": INK,
    "font.family": ["DejaVu Sans"],
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.dpi": 150,
}
_MOMENTS = 5


def draw_all(out: Path, report: dict[str, Any]) -> list[str]:
    """Draw what the files in ``out`` allow; returns the names of the pictures made."""
    drawn = []
    with plt.rc_context(_STYLE):
        rows = _read_history(out / "history.csv")
        if rows:
            _save(draw_curves(rows, report), out / "curves.png")
            drawn.append("curves.png")
        densities = out / "pruned" / "density.csv"
        steps = max((float(r["step"]) for r in rows if r["arm"] == "pruned"), default=0.0)
        if densities.is_file() and steps:
            _save(draw_density(densities, steps, report), out / "density.png")
            drawn.append("density.png")
        if (out / "pruned" / "masks.json").is_file():
            _save(draw_masks(out / "pruned", report), out / "masks.png")
            drawn.append("masks.png")
    return drawn


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, bbox_inches="tight", pad_inches=0.25)
    plt.close(figure)
    temporary.replace(path)


def _read_history(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _heading(figure: Figure, title: str, below: str) -> None:
    """Title and subtitle above everything, at fixed distances whatever the figure's height."""
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 + 0.34 / height, title, fontsize=15, weight="bold", va="bottom")
    figure.text(0.01, 1 + 0.10 / height, below, fontsize=10, color=SOFT, va="bottom")


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
    """Loss, accuracy, cost and size over the epochs, both arms; ``rows`` are those of ``history.csv``."""
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 6.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.18, h_pad=0.14)  # type: ignore[union-attr, call-arg]
    _lines(panels[0, 0], rows, "validation_loss", "validation loss", floor=True)
    _lines(panels[0, 1], rows, "validation_accuracy", "validation accuracy (%)", 100)
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
    _heading(figure, f"{report['task']}: a network that shrinks while it trains", _verdict(report))
    return figure


def _first_at_target(rows: list[dict[str, str]], report: dict[str, Any]) -> float | None:
    if report["config"]["target_sparsity"] is None:
        return None
    there = [
        float(row["epoch"]) for row in rows if row["arm"] == "pruned" and row["target_reached"] == "True"
    ]
    return there[0] if there else None


def _verdict(report: dict[str, Any]) -> str:
    baseline, pruned = report["baseline"], report["pruned"]
    parts = []
    if copy := data_of(report).get("copy"):
        parts.append(copy)
    if baseline:
        parts.append(f"test accuracy {100 * baseline['test_accuracy']:.1f} % dense")
    if pruned:
        sizes = f"{100 * pruned['sparsity']:.0f} % sparsity"
        if "sparsity_of_model" in pruned:
            sizes += f" ({100 * pruned['sparsity_of_model']:.0f} % of all parameters)"
        parts.append(f"{100 * pruned['test_accuracy']:.1f} % pruned at {sizes}")
    flops = report["ratios"].get("flops_per_step_last")
    if flops is not None:
        parts.append(f"last step at {100 * flops:.0f} % of the FLOPs")
    return ",  ".join(parts) + ".   dots: the weights that were kept" if parts else ""


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
    top.stairs(100 * overall, edges, baseline=0, fill=True, color=_LIFE(0.35), lw=0)
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
        cmap=_LIFE,
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
    _heading(
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


def _moments(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most five frames: the first, the last, and those nearest to equal steps of sparsity between them."""
    if len(frames) <= _MOMENTS:
        return frames
    reached = np.array([frame["sparsity"] for frame in frames])
    wanted = np.linspace(reached[0], reached[-1], _MOMENTS)
    chosen = sorted({int(np.abs(reached - w).argmin()) for w in wanted[1:-1]} - {0, len(frames) - 1})
    return [frames[i] for i in (0, *chosen, len(frames) - 1)]


def draw_masks(folder: Path, report: dict[str, Any]) -> Figure:
    """The blocks of every layer at a few moments: dark where a live block's weights are large, pale where it
    is gone.

    All matrices of a row have one scale, so a layer whose neurons were cut is drawn smaller."""
    described = json.loads((folder / "masks.json").read_text())
    frames = _moments(described["frames"])
    layers = list(described["shapes"])[:8]
    widest = max(shape[1] for shape in described["shapes"].values())
    heights = [max(0.32, min(1.0, described["shapes"][n][0] / widest)) for n in layers]
    figure, panels = plt.subplots(
        len(layers),
        len(frames),
        figsize=(2.25 * len(frames) + 0.6, 2.2 * sum(heights) + 0.7),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    per_epoch = report["pruned"]["steps"] / max(1, report["pruned"]["epochs"]) if report["pruned"] else 1.0
    with np.load(folder / "masks.npz", allow_pickle=False) as arrays:
        for column, frame in enumerate(frames):
            for row, name in enumerate(layers):
                axes = panels[row, column]
                _bare(axes)
                if row == 0:
                    axes.set_title(
                        f"epoch {frame['step'] / per_epoch:.1f}\n{100 * frame['sparsity']:.0f} % gone",
                        fontsize=10,
                    )
                if column == 0:
                    outputs, inputs = described["shapes"][name]
                    axes.set_ylabel(f"{name}\n{inputs} → {outputs}", fontsize=9, color=INK)
                if name in frame["layers"]:
                    part = frame["layers"][name]
                    _mask_image(
                        axes, arrays[part["key"]].astype(float), part["shape"], described["shapes"][name]
                    )
    _heading(
        figure,
        f"{report['task']}: the live blocks",
        "dark: large weights;  light: small;  blank: gone and no longer computed;  "
        "dashed: the size before neurons were cut out",
    )
    return figure


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _mask_image(axes: Axes, image: np.ndarray, shape: list[int], built: list[int]) -> None:
    live = image[image > 0]
    low, high = (np.quantile(live, 0.02), np.quantile(live, 0.98)) if live.size else (0.0, 1.0)
    shown = np.ma.masked_where(image <= 0, image)
    colours = _WEIGHT.with_extremes(bad=_LIFE(0.0))
    outputs, inputs = shape
    axes.imshow(
        shown,
        cmap=colours,
        vmin=low,
        vmax=max(high, low + 1e-9),
        extent=(0, inputs, outputs, 0),
        interpolation="nearest",
        aspect="auto" if built[1] < 0.32 * built[0] else "equal",
    )
    if list(shape) != list(built):
        outline = Rectangle((0, 0), built[1], built[0], fill=False, edgecolor=RULE, lw=1.2, ls=(0, (3, 3)))
        axes.add_patch(outline)
    axes.set_xlim(0, built[1])
    axes.set_ylim(built[0], 0)
