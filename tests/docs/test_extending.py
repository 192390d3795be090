"""docs/extending.md: its score and its policy prune the digits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import dynaprune
from dynaprune.nn import swap_layers

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
STEPS = 120


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the document's blocks define, with digits for its model and data."""
    pixels, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "model": nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        "inputs": torch.tensor(pixels, dtype=torch.float32) / 16,
        "labels": torch.tensor(labels),
    }
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, DOCUMENT.name, "exec"), found)
    found["pruner"].detach()
    return found


def digits_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, names: dict[str, Any]) -> float:
    """Accuracy on what was trained on, after the steps of the document's settings."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(len(names["inputs"]), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(names["inputs"][rows]), names["labels"][rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(names["inputs"]).argmax(1) == names["labels"]).float().mean())


@pytest.mark.filterwarnings("ignore:the model runs:RuntimeWarning")
def test_the_score_prunes_digits(names: dict[str, Any]) -> None:
    model = digits_net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    pruner = dynaprune.attach(model, optimizer, names["config"])
    accuracy = train(model, optimizer, names)
    report = pruner.report()
    assert report["target_reached"] and report["sparsity"] >= 0.6 and accuracy > 0.8
    assert report["config"]["score"] == "gradient_per_weight"
    state = pruner.state_dict()["score"]
    assert state["name"] == "gradient_per_weight"
    assert state["layers"]["0"]["block"].shape == model[0].layout.mask.shape


def test_the_policy_rewires_digits_at_a_constant_number_of_blocks(names: dict[str, Any]) -> None:
    model = digits_net()
    swap_layers(model, 8, exclude=["4"])
    for layer in (model[0], model[2]):
        mask = layer.layout.mask
        layer.layout.release_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.6)
    before = [layer.layout.mask.clone() for layer in (model[0], model[2])]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    pruner = dynaprune.attach(model, optimizer, names["set_config"])
    accuracy = train(model, optimizer, names)
    after = [layer.layout.mask for layer in (model[0], model[2])]
    report = pruner.report()
    assert [int(m.sum()) for m in after] == [int(m.sum()) for m in before]
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    assert report["blocks_regrown"] == report["removed_untested"] > 0 and accuracy > 0.8
    assert report["config"]["policy"] == "SET" and pruner.structure_final
