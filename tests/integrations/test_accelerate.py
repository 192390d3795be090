"""accelerate: a registered pruner and the structure in the model's file continue a run bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dynaprune
import dynaprune.integrations
from dynaprune.saving.carried import carry_structure, from_tensors, to_tensors
from dynaprune.saving.manifest import structure_manifest
from tests.integrations.scripts import run_example
from tests.pruning.attached import batch, loss_of, mlp, settings, sparse_layers

accelerate = pytest.importorskip("accelerate")


class Run:
    """A training through accelerate that cuts neurons, to be saved in the middle."""

    def __init__(self) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True)
        bare = mlp()
        optimizer = torch.optim.Adam(bare.parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(bare, optimizer)
        self.pruner = dynaprune.attach(self.model, self.optimizer, settings(neurons=True))
        carry_structure(self.model)
        self.accelerator.register_for_checkpointing(self.pruner)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.accelerator.backward(loss_of(self.model, step))
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("safe", [True, False])
def test_a_resumed_run_ends_like_the_uninterrupted_one(safe: bool, tmp_path: Path) -> None:
    whole = Run()
    whole.train(0, 10)
    assert whole.pruner.compactions > 0 and whole.pruner.report()["neurons_removed"] > 0
    whole.accelerator.save_state(str(tmp_path), safe_serialization=safe)
    assert (tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")).exists()
    whole.train(10, 24)
    resumed = Run()
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.pruner.steps == 10
    resumed.train(10, 24)
    assert resumed.pruner.target_reached
    assert structure_manifest(resumed.model) == structure_manifest(whole.model)
    for mine, theirs in zip(sparse_layers(resumed.model), sparse_layers(whole.model), strict=True):
        assert torch.equal(mine.layout.slot_of_block, theirs.layout.slot_of_block)
    parameters = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)
    left, right = resumed.pruner.report(), whole.pruner.report()
    keys = ("history", "removed_untested", "neurons_removed", "structure_version", "compactions")
    assert all(left[key] == right[key] for key in keys)


def test_the_documented_script(tmp_path: Path) -> None:
    x = torch.cat([batch(step)[0] for step in range(20)])
    model = mlp()
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-2),
        "loader": DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16),
        "loss": nn.functional.cross_entropy,
        "output_dir": str(tmp_path),
    }
    done = run_example(dynaprune.integrations.__doc__, names)
    assert done["pruner"].target_reached
    assert (tmp_path / "custom_checkpoint_0.pkl").exists()
    state = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    again = from_tensors(to_tensors(state))
    assert again is not None and again["steps"] == 20
    assert all(torch.equal(again["slots"][name], slots) for name, slots in state["slots"].items())
