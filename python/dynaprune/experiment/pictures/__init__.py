"""The three pictures of a run: ``curves.png``, ``density.png`` (layer by time) and ``masks.png``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from dynaprune.experiment.pictures.curves import draw_curves
from dynaprune.experiment.pictures.density import draw_density
from dynaprune.experiment.pictures.masks import draw_masks
from dynaprune.experiment.pictures.style import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_all", "draw_curves", "draw_density", "draw_masks", "save_figure"]


def draw_all(out: Path, report: dict[str, Any]) -> list[str]:
    """Draw what the files in ``out`` allow; returns the names of the pictures made."""
    drawn = []
    with plt.rc_context(STYLE):
        rows = _read_history(out / "history.csv")
        if rows:
            save_figure(draw_curves(rows, report), out / "curves.png")
            drawn.append("curves.png")
        densities = out / "pruned" / "density.csv"
        steps = max((float(r["step"]) for r in rows if r["arm"] == "pruned"), default=0.0)
        if densities.is_file() and steps:
            save_figure(draw_density(densities, steps, report), out / "density.png")
            drawn.append("density.png")
        if _has_masks(out / "pruned" / "masks.json"):
            save_figure(draw_masks(out / "pruned", report), out / "masks.png")
            drawn.append("masks.png")
    return drawn


def _has_masks(path: Path) -> bool:
    """Whether the arm's layers were block-sparse; whole neurons leave plain layers, which have no masks."""
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8"))["shapes"])


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as a PNG file, all at once or not at all, and close it."""
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, bbox_inches="tight", pad_inches=0.25)
    plt.close(figure)
    temporary.replace(path)


def _read_history(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
