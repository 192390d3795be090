"""Saving and loading: any structure into any other of the same network, and nothing half-loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import dynaprune
from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear, swap_back, swap_layers
from dynaprune.saving.checkpoint import load, save
from dynaprune.saving.manifest import structure_manifest
from dynaprune.saving.reshape import METADATA_KEY, add_structure_hooks, apply_structure
from tests.neurons.cutting import kill
from tests.rounding import agree
from tests.saving.checkpoint_cases import INPUT, Tied, network, other_block, outputs, pruned, swapped


@pytest.mark.parametrize("target", [network, swapped, other_block, pruned])
def test_any_structure_loads_into_any_other(target: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    source = pruned()
    x = torch.randn(INPUT)
    expected = outputs(source, x)
    path = save(source, tmp_path / "net.safetensors")
    model = target()
    weights = [model[0].weight, model[7].weight if isinstance(model[7], nn.Linear) else model[7].values]
    assert load(model, path) is model
    assert agree(outputs(model, x), expected)
    assert structure_manifest(model) == structure_manifest(source)
    assert weights[0] is model[0].weight and weights[1] is model[7].values  # type: ignore[union-attr]
    model.train()
    F.cross_entropy(model(x), torch.arange(5)).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


def test_plain_cut_model_loads_into_a_sparse_one(tmp_path: Path) -> None:
    source = pruned()
    x = torch.randn(INPUT)
    expected = outputs(source, x)
    swap_back(source)
    assert not any(isinstance(m, BlockSparseLayer) for m in source.modules())
    assert torch.allclose(outputs(source, x), expected, rtol=1e-5, atol=1e-6)
    model = load(swapped, save(source, tmp_path / "plain.safetensors"))
    assert not any(isinstance(m, BlockSparseLayer) for m in model.modules())
    assert agree(outputs(model, x), outputs(source, x))


def test_file_directory_and_nothing_left_behind(tmp_path: Path) -> None:
    model = pruned()
    assert save(model, tmp_path) == tmp_path / "model.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert agree(outputs(load(network, tmp_path), torch.ones(INPUT)), outputs(model, torch.ones(INPUT)))
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert all(bool(file.get_tensor(k).isfinite().all()) for k in file.keys())  # noqa: SIM118
    with pytest.raises(FileNotFoundError):
        load(network, tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        save(model, tmp_path / "no" / "such" / "folder.safetensors")


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(network(), tmp_path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dynaprune.saving.durable.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(pruned(), tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = Tied()
    swap_layers(source, 16, include=["hidden"])
    path = save(source, tmp_path)
    model = load(Tied, path)
    assert isinstance(model, Tied) and model.decoder.weight is model.embedding.weight
    x = torch.arange(40)
    assert agree(model(x), source(x))
    with safe_open(str(path), "pt") as file:
        assert "decoder.weight" not in file.keys()  # noqa: SIM118
    with pytest.raises(ValueError, match="tied"):
        load(Tied(tie=False), path)
    with pytest.raises(ValueError, match="tied"):
        load(Tied(), save(Tied(tie=False), tmp_path / "untied.safetensors"))


def test_dtype_and_flags_of_the_model_stay(tmp_path: Path) -> None:
    source = pruned()
    path = save(source, tmp_path)
    model = network().to(torch.bfloat16)
    model[7].weight.requires_grad_(False)  # type: ignore[union-attr]
    model.eval()
    load(model, path)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model[7].values.requires_grad and not model[7].training  # type: ignore[union-attr]
    for (name, mine), theirs in zip(model.named_parameters(), source.parameters(), strict=True):
        live = ~theirs.isnan()
        assert torch.equal(mine[live], theirs[live].bfloat16()), name


def test_state_dicts_carry_the_structure() -> None:
    """The usual 'keep the best, restore it': into the model that went on shrinking, and into a fresh one."""
    model = pruned()
    handles = add_structure_hooks(model)
    x = torch.randn(INPUT)
    expected = outputs(model, x)
    best = copy.deepcopy(model.state_dict())
    kill(model, "9", rows=[2], columns=[1])
    kill(model, "7", rows=[1])
    example = ExampleInputs.of(x)
    assert cut_dead_neurons(model, find_groups(model, example), example).neurons == {
        "3": 16,
        "7": 16,
        "9": 16,
    }
    layer = model[7]
    model.load_state_dict(best)
    assert model[7] is layer and agree(outputs(model, x), expected)
    fresh = network()
    add_structure_hooks(fresh)
    fresh.load_state_dict(best)
    assert isinstance(fresh[3], BlockSparseConv2d) and agree(outputs(fresh, x), expected)
    wrapper = nn.ModuleDict({"net": fresh})
    fresh.load_state_dict(network_state())
    wrapper.load_state_dict({f"net.{k}": v for k, v in fresh.state_dict().items()})
    for handle in handles:
        handle.remove()
    assert METADATA_KEY not in model.state_dict()._metadata[""]  # type: ignore[attr-defined]


def network_state() -> Any:
    plain = network()
    add_structure_hooks(plain)
    return plain.state_dict()


def test_state_dict_that_does_not_fit_changes_nothing() -> None:
    model, source = swapped(), pruned()
    add_structure_hooks(model)
    add_structure_hooks(source)
    state = source.state_dict()
    state["7.bias"] = torch.zeros(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"7\.bias"):
        model.load_state_dict(state)
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items())


def test_a_single_layer_can_be_the_model(tmp_path: Path) -> None:
    source = BlockSparseLinear.from_dense(nn.Linear(64, 48), 16)
    kill(source, "", rows=[1])
    x = torch.randn(3, 64)
    loaded = load(nn.Linear(64, 48), save(source, tmp_path))
    assert isinstance(loaded, BlockSparseLinear) and agree(loaded(x), source(x))
    with pytest.raises(ValueError, match="expected a"):
        apply_structure(nn.ReLU(), {"format": "other"})


def test_taps_and_gradients_of_a_resized_model() -> None:
    model, source = swapped(), pruned()
    model[9].enable_tap_()  # type: ignore[operator]
    x = torch.randn(INPUT)
    loss = F.cross_entropy(model(x), torch.arange(5))
    loss.backward()
    apply_structure(model, structure_manifest(source))
    model.load_state_dict(source.state_dict())
    F.cross_entropy(model(x), torch.arange(5)).backward()
    assert model[9].tap.grad.shape == (2, 4 * 3)  # type: ignore[union-attr]
    assert loss is not None


class Run:
    """A pruned training of a small MLP that cuts neurons, to be saved in the middle."""

    def __init__(self, steps: int = 40) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
        ).double()
        with torch.no_grad():
            self.model[0].weight[32:] *= 1e-3  # type: ignore[index, operator]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, amsgrad=True)
        config = dynaprune.PruningConfig(
            target_sparsity=0.6, block_size=16, total_steps=steps, interval=3, score="taylor", neurons=True
        )
        self.pruner = dynaprune.attach(self.model, self.optimizer, config)
        self.x, self.y = torch.randn(20, 64).double(), torch.randint(0, 10, (20,))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "pruner": self.pruner}
        return {name: part.state_dict() for name, part in parts.items()}


def test_going_back_to_an_earlier_structure_in_the_same_run() -> None:
    """Widths come back with the state: neurons are traced anew, and the rest of the run repeats."""
    run = Run()
    run.train(6)
    early = copy.deepcopy(run.state())
    run.train(34)
    first = copy.deepcopy(run.state()["model"])
    assert structure_manifest(run.model)["layers"]["0"]["out"] < 96
    for name in ("pruner", "optimizer", "model"):
        getattr(run, name).load_state_dict(early[name])
    run.train(34)
    again = run.model.state_dict()
    assert set(again) == set(first) and all(torch.equal(again[key], value) for key, value in first.items())


@pytest.mark.parametrize("order", [["model", "optimizer", "pruner"], ["pruner", "optimizer", "model"]])
def test_a_resumed_training_goes_on_bitwise_after_cuts(order: list[str], tmp_path: Path) -> None:
    whole = Run()
    whole.train(13)
    assert whole.pruner.report()["neurons_removed"] > 0
    torch.save(whole.state(), tmp_path / "state.pt")
    whole.train(27)
    resumed = Run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in order:
        getattr(resumed, name).load_state_dict(state[name])
    resumed.train(27)
    assert whole.pruner.target_reached and resumed.pruner.target_reached
    assert structure_manifest(resumed.model) == structure_manifest(whole.model)
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert resumed.pruner.report()["neurons_removed"] == whole.pruner.report()["neurons_removed"]
