"""``python -m benchmarks.families``: which architectures train, shrink, save, load and compile.

Every family runs in a process of its own with a time limit: attach, 30 steps with pruning events and
cuts of neurons, outputs compared with dense references at each stage, save and load, deep copy,
``torch.compile``. The result is a CSV file. The exit status is 1 where an output is wrong, a process
hangs or dies, or an error comes that is no refusal. Every row says of which commit it is.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.family_checks import quietly
from benchmarks.family_models import Family, families
from dynaprune.experiment.metrics import environment

RESULTS = Path(__file__).parent / "results" / "families.csv"
COLUMNS = (
    *("family", "library", "verdict", "swapped", "sparsity", "neurons", "cut", "not_cut", "reason"),
    *("seconds", "version", "torch", "dynaprune", "commit"),
)


def examined(family: Family, limit: float) -> dict[str, object]:
    """One row: the family's outcome in a process of its own, forked so that libraries are imported once."""
    started = time.monotonic()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=one, args=(family, sender))
    process.start()
    sender.close()
    row: dict[str, object] = {"verdict": "hangs", "reason": f"still running after {limit:.0f} s"}
    if receiver.poll(limit):
        try:
            row = receiver.recv()
        except EOFError:
            process.join()
            row = {"verdict": "died", "reason": f"exit status {process.exitcode}"}
    process.kill()
    process.join()
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def one(family: Family, sender: Connection) -> None:
    """Send a family's outcome as a dict."""
    # Blocks of 8 would go to the dense library: the kernels are what is tried here.
    os.environ.setdefault("DYNAPRUNE_BACKEND", "cpu")
    torch.set_num_threads(1)
    sender.send(quietly(family)._asdict())


def read(path: Path) -> dict[str, dict[str, object]]:
    """The rows of a CSV file by family; none where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["family"]: dict(row) for row in csv.DictReader(file)}


def write(path: Path, rows: dict[str, dict[str, object]]) -> None:
    """A CSV file of the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def main() -> int:
    """Run the families named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families, whose rows are replaced; all by default")
    parser.add_argument("--limit", type=float, default=300, help="seconds per family")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file")
    chosen = parser.parse_args()
    known = {family.name: family for family in families()}
    if unknown := set(chosen.names) - set(known):
        parser.error(f"expected families among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    where = environment(torch.device("cpu"))
    own = {"commit": where["commit"], **{each: where["versions"][each] for each in ("torch", "dynaprune")}}
    written = read(chosen.out) if chosen.names else {}
    verdicts = []
    for name in chosen.names or known:
        library = known[name].library
        row = {"family": name, "library": library, "version": version(library), **own}
        row |= examined(known[name], chosen.limit)
        written[name] = row
        write(chosen.out, written)
        figures = (
            f"{row['swapped']:.0%} swapped, {row['sparsity']:.0%} sparse, {row['neurons']} neurons cut"
            if row["verdict"] == "works"
            else str(row["reason"])[:160]
        )
        print(f"{name:30} {row['verdict']:8} {row['seconds']:6} s  {figures}", flush=True)
        verdicts.append(row["verdict"])
    print(", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))), "at", own["commit"])
    return int(any(verdict not in ("works", "refused") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
