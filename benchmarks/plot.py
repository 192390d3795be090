"""Speedup over density: ``python -m benchmarks.plot FILE.csv ... --out F.png``, from ``benchmarks.run``.

One panel per op, shape and dtype; one line per provider and block. The dashed line is the ceiling,
1 / density.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter

Row = dict[str, str]


def speedups(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]]:
    """``(op, shape, dtype)`` -> ``provider, block`` -> (density, best dense time / time), by density."""
    panels: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row["efficiency"] and not row["provider"].startswith("dense"):
            density = float(row["density"])
            line = f"{row['provider']}, {row['block']}"
            panel = panels[row["op"], row["shape"], row["dtype"]]
            panel[line].append((density, float(row["efficiency"]) / density))
    return {
        panel: {name: sorted(points) for name, points in lines.items()} for panel, lines in panels.items()
    }


def draw(rows: list[Row], path: Path) -> None:
    """Write the figure.

    Raises:
        ValueError: no row has a speedup.
    """
    panels = speedups(rows)
    if not panels:
        raise ValueError("expected rows of block-sparse providers beside a dense one, got none")
    wide = min(len(panels), 3)
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(5 * wide, 4 * high), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((op, shape, dtype), lines) in zip(axes.flat, sorted(panels.items()), strict=False):
        densities = sorted({density for points in lines.values() for density, _ in points})
        axis.plot(densities, [1 / density for density in densities], "k--", label="ceiling")
        axis.axhline(1.0, color="gray", linewidth=0.5)
        for name, points in sorted(lines.items()):
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="density", ylabel="best dense time / time")
        axis.set_xticks(densities, [f"{density:.2g}" for density in densities])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{op} {shape} {dtype}", fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(", ".join(sorted({row["device"] for row in rows})))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for path in options.csv:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    draw(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
