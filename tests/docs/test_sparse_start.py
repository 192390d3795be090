"""docs/sparse-start.md: its example trains, and what it prints is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "sparse-start.md"


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
    assert [group["sparse_multiplier"] for group in names["optimizer"].param_groups] == [1.0, 4.0, 5.2]
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
