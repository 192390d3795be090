"""docs/families.md says of every architecture what benchmarks/results/families.csv has."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_has_the_rows_of_the_results() -> None:
    with (ROOT / "benchmarks" / "results" / "families.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        [
            row["family"].partition(" (")[0],
            row["library"],
            row["verdict"],
            *((f"{float(row['swapped']):.0%}", row["neurons"]) if row["verdict"] == "works" else ("", "")),
        ]
        for row in rows
    ]
    lines = (ROOT / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:6]] for line in lines if line.startswith("|")]
    assert table[2:] == expected
    assert {row["verdict"] for row in rows} <= {"works", "refused"}
    assert sum(row["verdict"] == "works" for row in rows) >= 32 and len(rows) >= 40
