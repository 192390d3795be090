"""docs/rewire.md: its example trains, and what it prints is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "rewire.md"


def test_the_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, DOCUMENT.name, "exec"), names)
    printed = capsys.readouterr().out
    assert (found := re.match(r"(\d+) swaps; (\d+)% of the blocks have lived", printed)) is not None
    assert int(found[1]) > 200 and 20 < int(found[2]) < 100
    with torch.no_grad():
        right = (names["model"](names["inputs"]).argmax(1) == names["labels"]).float().mean()
    assert right > 0.9 and names["pruner"].sparsity > 0.79
