"""Which multiplier of the learning rate do sparse blocks want from the first step on? A0 of docs/matrix.md.

    python -m benchmarks.rate_grid transformer --data DIR --out runs/A0
    python -m benchmarks.rate_grid batchnorm --data DIR --out runs/A0

Each cell is one arm of `dynaprune train` in a process of its own, one thread, seed 100: a density of the
blocks from the first step, and a multiplier. Its row of the table has the lowest loss on the validation part,
in nats. The same command goes on where it was cut short, and leaves cells alone that the table has, on
whatever machine they ran. The cells that the rules of docs/matrix.md compare come first.
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

from dynaprune.experiment.write import write_csv

DENSITIES = (0.5, 0.25, 0.1)
MULTIPLIERS = (1, 2, 4, 8)
# What the rules come to, each at the nearest multiplier of the grid.
DECISIVE = {0.5: (1, 2), 0.25: (1, 4), 0.1: (1, 4, 8)}
# The small language model, 128 wide, cannot be 0.9 sparse and keep a block of 16 in every row and column.
BLOCK_SIZES = {0.5: 16, 0.25: 16, 0.1: 8}
SEED = 100  # of pilots: no result has it

NETWORKS = {
    "transformer": ("lm", "--size", "small", "--tokens", "1500000"),
    "batchnorm": (
        *("cifar10", "--width", "0.5", "--train-samples", "10000", "--epochs", "5", "--batch-size", "64"),
        *("--optimizer", "adamw"),
    ),
}
TABLE = Path(__file__).parent / "results" / "rate_grid.csv"
_COLUMNS = (
    *("network", "density", "multiplier", "validation_loss", "flops", "seconds", "steps"),
    *("commit", "cpu", "cpu_kernels", "threads"),
)


class Cell(NamedTuple):
    """One arm. ``density`` 1 is the dense network."""

    network: str
    density: float
    multiplier: int

    @property
    def folder(self) -> str:
        return f"{self.network}-{self.density:g}-x{self.multiplier}"

    @property
    def key(self) -> tuple[str, str, str]:
        """How the table names it."""
        return self.network, f"{self.density:g}", str(self.multiplier)

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
        *("--block-size", str(BLOCK_SIZES[density])),
        *("--initial-sparsity", sparsity, "--target-sparsity", sparsity),
        *("--sparse-rate", str(multiplier)),
    )


def cells(network: str) -> Iterator[Cell]:
    """The cells that rules compare, the dense network, then the rest of the grid."""
    yield from (Cell(network, density, each) for density, many in DECISIVE.items() for each in many)
    yield Cell(network, 1, 1)
    for density, each in itertools.product(DENSITIES, MULTIPLIERS):
        if each not in DECISIVE[density]:
            yield Cell(network, density, each)


def row_of(cell: Cell, folder: Path) -> dict[str, str]:
    """The row of a finished cell, from what its arm wrote into ``folder``."""
    arm = json.loads((folder / "arm.json").read_text(encoding="utf-8"))
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(epoch["validation_loss"]) for epoch in csv.DictReader(file)]
    result, environment = arm["result"], arm["environment"]
    said = {"validation_loss": f"{min(losses):.4f}", "seconds": f"{result['train_seconds']:.0f}"}
    said |= {"flops": f"{result['flops_total']:.4g}", "steps": str(result["steps"])}
    said |= {name: str(environment[name]) for name in ("commit", "cpu", "cpu_kernels", "threads")}
    row = dict(zip(_COLUMNS, cell.key, strict=False)) | said
    return {name: row[name] for name in _COLUMNS}


def read_table(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of a table by network, density and multiplier; none where there is no table."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["network"], row["density"], row["multiplier"]): row for row in csv.DictReader(file)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--out", required=True, type=Path, help="folder of the arms")
    parser.add_argument("--table", type=Path, default=TABLE, help="the CSV file of what is finished")
    parser.add_argument("--checkpoints", type=Path, help="folder of the checkpoints, beside --out by default")
    options = parser.parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = options.checkpoints or out.with_name(out.name + "-checkpoints")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for cell in cells(options.network):
        rows = read_table(options.table)
        if cell.key in rows:
            continue
        print(cell.folder, flush=True)
        failed = subprocess.run(cell.command(options.data, out, checkpoints), env=one_thread).returncode
        if failed:
            print(f"{cell.folder} ended with {failed}", file=sys.stderr)
            return failed
        rows[cell.key] = row_of(cell, out / cell.folder)
        options.table.parent.mkdir(parents=True, exist_ok=True)
        write_csv(options.table, list(rows.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
