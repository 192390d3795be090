"""``masks.png``: the live blocks of every layer at a few moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from dynaprune.experiment.pictures.style import INK, LIFE, RULE, WEIGHT, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_masks"]

_MOMENTS = 5


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
    heading(
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
    colours = WEIGHT.with_extremes(bad=LIFE(0.0))
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
