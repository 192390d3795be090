"""Which multiplier of the learning rate do sparse blocks want from the first step on? A0 of docs/matrix.md.

    python -m benchmarks.rate_grid transformer --data DIR --out runs/A0
    python -m benchmarks.rate_grid batchnorm --data DIR --out runs/A0

Each cell is one arm of `dynaprune train` in a process of its own, one thread, seed 100: a density of the
blocks from the first step, and a multiplier. The same command goes on where it was cut short and leaves
finished cells alone. The table is written after each cell: the lowest loss on the validation part, in nats.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

DENSITIES = (0.5, 0.25, 0.1)
MULTIPLIERS = (1, 2, 4, 8)
SEED = 100  # of pilots: no result has it

NETWORKS = {
    "transformer": ("lm", "--size", "small", "--tokens", "1500000"),
    "batchnorm": (
        *("cifar10", "--width", "0.5", "--train-samples", "10000", "--epochs", "5", "--batch-size", "64"),
        *("--optimizer", "adamw"),
    ),
}
_COLUMNS = ("network", "density", "multiplier", "validation_loss", "flops", "seconds")


class Cell(NamedTuple):
    """One arm. ``density`` 1 is the dense network."""

    network: str
    density: float
    multiplier: int

    @property
    def folder(self) -> str:
        return f"{self.network}-{self.density:g}-x{self.multiplier}"

    def command(self, data: str, out: Path, checkpoints: Path) -> list[str]:
        task, *settings = NETWORKS[self.network]
        arm = "baseline" if self.density == 1 else "pruned"
        sparse = () if self.density == 1 else _sparse(self.density, self.multiplier)
        return [
            *(sys.executable, "-m", "dynaprune", "train", task, "--arm", arm, "--seed", str(SEED)),
            *(*settings, "--data", data, "--out", str(out / self.folder), "--quiet", *sparse),
            *("--checkpoints", str(checkpoints / self.folder)),
        ]


def _sparse(density: float, multiplier: int) -> tuple[str, ...]:
    sparsity = str(1 - density)
    return (
        *("--block-size", "16", "--initial-sparsity", sparsity, "--target-sparsity", sparsity),
        *("--sparse-rate", str(multiplier)),
    )


def cells(network: str) -> Iterator[Cell]:
    """The dense network, then the grid."""
    yield Cell(network, 1, 1)
    yield from (Cell(network, *of) for of in itertools.product(DENSITIES, MULTIPLIERS))


def figures(cell: Cell, out: Path) -> dict[str, object] | None:
    """What a finished cell showed, None of one that is not finished."""
    path = out / cell.folder / "arm.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
    with path.with_name("history.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(epoch["validation_loss"]) for epoch in csv.DictReader(file)]
    return {
        "network": cell.network,
        "density": cell.density,
        "multiplier": cell.multiplier,
        "validation_loss": min(losses),
        "flops": result["flops_total"],
        "seconds": round(result["train_seconds"], 1),
    }


def write_table(network: str, out: Path) -> Path:
    """``<network>.csv`` in ``out``, of the cells that are finished."""
    path = out / f"{network}.csv"
    rows = [row for cell in cells(network) if (row := figures(cell, out)) is not None]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, _COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--checkpoints", type=Path, help="folder of the checkpoints, beside --out by default")
    options = parser.parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = options.checkpoints or out.with_name(out.name + "-checkpoints")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for cell in cells(options.network):
        if figures(cell, out) is None:
            print(cell.folder, flush=True)
            failed = subprocess.run(cell.command(options.data, out, checkpoints), env=one_thread).returncode
            if failed:
                print(f"{cell.folder} ended with {failed}", file=sys.stderr)
                return failed
        path = write_table(options.network, out)
    print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
