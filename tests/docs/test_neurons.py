"""docs/neurons.md: its example trains, and its layers stay plain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "neurons.md"


def test_the_example_trains() -> None:
    names: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, DOCUMENT.name, "exec"), names)
    model, pruner = names["model"], names["pruner"]
    assert pruner.target_reached and pruner.report()["removed_passed"] > 0
    assert [type(layer) for layer in model][::2] == [nn.Linear] * 3
    assert model[0].out_features < 128 and model[2].out_features < 128
    with torch.no_grad():
        right = (model(names["inputs"]).argmax(1) == names["labels"]).float().mean()
    assert right > 0.9
