"""docs/sparse-start.md: its example trains, and what it prints is so."""

from __future__ import annotations

import csv
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from dynaprune.experiment.report_text import shown

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "sparse-start.md"
RESULTS = ROOT / "benchmarks" / "results" / "large_from_meta.csv"


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    first, groups, budget, meta, trained = re.findall(
        r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
    )
    exec(compile(first, DOCUMENT.name, "exec"), names)
    assert "80.0% of the prunable weights were never there" in capsys.readouterr().out
    with torch.no_grad():
        right = (names["model"](names["inputs"]).argmax(1) == names["labels"]).float().mean()
    assert right > 0.9
    assert names["pruner"].report()["blocks_never_present"] == 922
    exec(compile(groups, DOCUMENT.name, "exec"), names)
    assert [group["sparse_multiplier"] for group in names["optimizer"].param_groups] == [1.0, 4.0]
    exec(compile(budget, DOCUMENT.name, "exec"), names)
    assert 300 < names["steps"] < 900 and names["config"].total_steps == names["steps"]
    assert f"{names['steps']} sparse steps" in capsys.readouterr().out
    exec(compile(meta, DOCUMENT.name, "exec"), names)
    tokens = torch.randint(0, 256, (2, 8))
    names["model"](tokens, labels=tokens).loss.backward()
    names["optimizer"].step()
    assert names["pruner"].sparsity >= 0.8
    exec(compile(trained, DOCUMENT.name, "exec"), names)
    assert names["prepared"].pretrained is not None and set(names["prepared"].left_out) == {"0", "2"}


def test_the_figures_of_the_large_model_are_those_of_the_benchmark() -> None:
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]
    (table,) = re.findall(r"\| \| \|\n\|---\|---:\|\n((?:\|.*\n)+)", DOCUMENT.read_text(encoding="utf-8"))
    told = [line.split(" | ")[1].removesuffix(" |") for line in table.splitlines()]
    step = statistics.median(float(row["step_seconds"]) for row in rows)
    assert told == [
        *(
            shown(int(last[key]), "bytes")
            for key in ("dense_state_bytes", "state_bytes", "resident_peak_bytes")
        ),
        f"{float(last['prepare_seconds']):.0f} s",
        f"{float(last['attach_seconds']):.1f} s",
        f"{step:.0f} s",
        f"{float(last['held_out_loss_before']):.2f} and {float(last['held_out_loss_after']):.2f} nats",
    ]
    assert int(last["dense_state_bytes"]) > 24 * 2**30 and int(last["resident_peak_bytes"]) <= 8 * 2**30
    assert float(last["held_out_loss_after"]) < float(last["held_out_loss_before"])
