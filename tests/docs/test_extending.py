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
    assert len(blocks) == 5
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


class Split(nn.Module):
    """Runs only while `span` fits the width of `first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.span = nn.Linear(64, 32), nn.Linear(32, 10), 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).relu().split(self.span, -1)
        return self.last(torch.cat([left, right], -1))


def test_the_family_keeps_its_numbers_in_step(names: dict[str, Any], tmp_path: Path) -> None:
    model = Split()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    pruner = dynaprune.attach(model, optimizer, names["family_config"], example_inputs=names["inputs"][:8])
    gone = torch.zeros(4, 8, dtype=torch.bool)
    gone[[0, 2]] = True  # half of each half
    layer = model.first.layout
    layer.release_(gone)
    with torch.no_grad():
        model.first.values.mul_(layer.slots_of(layer.mask).view(-1, 1, 1))
        model.first.bias.view(4, 8)[[0, 2]] = 0
    train(model, optimizer, names)
    assert pruner.report()["neurons_removed"] == 16
    assert model.first.out_features == 16 and model.span == 8
    dynaprune.save(model, tmp_path / "model.safetensors")
    loaded = dynaprune.load(Split(), tmp_path / "model.safetensors", families=names["family_config"].families)
    assert loaded.span == 8
    torch.testing.assert_close(loaded(names["inputs"]), model(names["inputs"]))
    with pytest.raises(TypeError, match="families as objects with find"):
        dynaprune.PruningConfig(families=[object()])
