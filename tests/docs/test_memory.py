"""docs/memory.md: its example runs, and its tables name what there is and what the benchmark found."""

from __future__ import annotations

import csv
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training_memory import table
from dynaprune import MemoryByKind
from dynaprune.experiment.memory_figures import MEMORY

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "training_memory.csv"


def test_the_example_tells_the_memory_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "memory.md", "exec"), names)
    found, model = names["found"], names["model"]
    assert found.most.weights == sum(each.nbytes for each in model.parameters())
    assert found.training_state == pytest.approx(4 * found.most.weights, rel=1e-4)
    assert found.peak == found.at_peak.total > found.training_state
    printed = capsys.readouterr().out
    assert f"optimizer state: {found.training_state / 2**20:.1f} MiB" in printed
    dense = 4 * (256 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10)
    assert 0.2 < found.most.weights / dense < 0.22


def test_every_kind_and_every_key_is_named() -> None:
    kinds = re.findall(r"^\| `(\w+)` \|", TEXT.split("## The kinds")[1].split("## ")[0], re.MULTILINE)
    assert kinds == [each.name for each in fields(MemoryByKind)]
    keys = re.findall(r"`(memory_bytes_\w+)`", TEXT)
    assert set(keys) <= {*MEMORY, "memory_bytes_measured"}


def test_the_figures_are_those_of_the_benchmark() -> None:
    """The ratios of the table of figures, and the whole table of BERT-base."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["network"], row["figure"]): row["ratio"] for row in rows}
    shown = re.findall(r"^\| `([\w-]+)` \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert len(shown) == len({row["network"] for row in rows}) == 5
    names = ("training state", "peak of tensors", "peak of the resident set")
    for network, *ratios in shown:
        assert ratios == [f"{float(found[network, name]):.3f}" for name in names], network
    assert table([_numbers(row) for row in rows if row["network"] == "bert-base"]) in TEXT


def _numbers(row: dict[str, str]) -> dict[str, Any]:
    ratio = float(row["ratio"]) if row["ratio"] else ""
    return {**row, **{key: int(row[key]) for key in ("dense_bytes", "sparse_bytes")}, "ratio": ratio}
