"""Colours, type and headings of the pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.colors import LinearSegmentedColormap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "COLOURS",
    "COLOURS_OF_CONTROLS",
    "INK",
    "LIFE",
    "PAPER",
    "RULE",
    "SOFT",
    "STYLE",
    "WEIGHT",
    "heading",
]

PAPER, INK, SOFT, RULE = "#fbfaf6", "#1f2937", "#6b7280", "#e3e0d8"
COLOURS = {"baseline": "#9a9184", "pruned": "#0b7a75"}
COLOURS_OF_CONTROLS = ("#d1603d", "#3b6ea8", "#b8860b", "#7b4f9d", "#5d7d32", "#a83b6e", "#4a4a4a")
ACCENT = "#d1603d"
LIFE = LinearSegmentedColormap.from_list("life", ["#f1eee5", "#bfe0d2", "#5fb3a3", "#0b7a75", "#08324a"])
WEIGHT = LinearSegmentedColormap.from_list("weight", ["#7cc5b4", "#0b7a75", "#08324a"])
STYLE: dict[Any, Any] = {
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


def heading(figure: Figure, title: str, below: str) -> None:
    """Title and subtitle above everything, at fixed distances whatever the figure's height."""
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 + 0.34 / height, title, fontsize=15, weight="bold", va="bottom")
    figure.text(0.01, 1 + 0.10 / height, below, fontsize=10, color=SOFT, va="bottom")
