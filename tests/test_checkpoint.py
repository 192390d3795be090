"""Saving and loading: any structure into any other of the same network, and nothing half-loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import dynaprune
from dynaprune.checkpoint import load, save
from dynaprune.manifest import METADATA_KEY, add_structure_hooks, apply_structure, structure_manifest
from dynaprune.nn import BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear, swap_back, swap_layers
from dynaprune.pruning.neuron_groups import ExampleInputs, find_groups
from dynaprune.pruning.neurons import cut_dead_neurons


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.PReLU(32),
        nn.Conv2d(32, 48, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 64),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


INPUT = (5, 3, 8, 8)


def pruned() -> nn.Sequential:
    """Trained, with dead blocks, a compacted layer and cut neurons in sparse and plain layers."""
    model = network()
    swap_layers(model, 16)
    x = torch.randn(INPUT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(5)).backward()
        optimizer.step()
    kill(model[3], columns=[0])
    kill(model[9], columns=[2])
    example = ExampleInputs.of(x)
    report = cut_dead_neurons(model, find_groups(model, example), example, [optimizer])
    assert report.neurons == {"0": 16, "7": 16}
    kill(model[3], rows=[1])
    with torch.no_grad():
        free = model[3].layout.lists.block_of_slot < 0  # type: ignore[union-attr, operator]
        model[3].values[free] = torch.nan  # type: ignore[index, union-attr]
    return model


def kill(layer: Any, rows: Any = (), columns: Any = ()) -> None:
    layout = layer.layout
    taps = 1 if layout.conv is None else layout.conv.taps
    dead = torch.zeros(layout.rows, taps, layout.columns // taps, dtype=torch.bool)
    dead[list(rows)] = True
    dead[:, :, list(columns)] = True
    layout.release_(dead.view(layout.rows, layout.columns))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def swapped() -> nn.Sequential:
    model = network()
    swap_layers(model, 16)
    kill(model[9], rows=[1])
    return model


def other_block() -> nn.Sequential:
    model = network()
    swap_layers(model, (8, 32))
    return model


@pytest.mark.parametrize("target", [network, swapped, other_block, pruned])
def test_any_structure_loads_into_any_other(target: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    source = pruned()
    x = torch.randn(INPUT)
    expected = outputs(source, x)
    path = save(source, tmp_path / "net.safetensors")
    model = target()
    weights = [model[0].weight, model[7].weight if isinstance(model[7], nn.Linear) else model[7].values]
    assert load(model, path) is model
    assert torch.equal(outputs(model, x), expected)
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
    assert torch.equal(outputs(model, x), outputs(source, x))


def test_file_directory_and_nothing_left_behind(tmp_path: Path) -> None:
    model = pruned()
    assert save(model, tmp_path) == tmp_path / "model.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(outputs(load(network, tmp_path), torch.ones(INPUT)), outputs(model, torch.ones(INPUT)))
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

    monkeypatch.setattr("dynaprune.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(pruned(), tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.decoder = nn.Linear(32, 40, bias=False)
        if tie:
            self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.hidden(self.embedding(x))))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = Tied()
    swap_layers(source, 16, include=["hidden"])
    path = save(source, tmp_path)
    model = load(Tied, path)
    assert isinstance(model, Tied) and model.decoder.weight is model.embedding.weight
    x = torch.arange(40)
    assert torch.equal(model(x), source(x))
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


def corrupted(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    with safe_open(str(path), "pt") as file:
        manifest = json.loads(file.metadata()[METADATA_KEY])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    text = change(manifest, tensors)
    metadata = {METADATA_KEY: text if isinstance(text, str) else json.dumps(manifest)}
    save_file(tensors, str(path), metadata)
    return path


def setting(layer: str, key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(manifest: dict[str, Any], _: dict[str, Tensor]) -> None:
        manifest["layers"][layer][key] = value

    return change


def top(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(manifest: dict[str, Any], _: dict[str, Tensor]) -> None:
        manifest[key] = value

    return change


def tensor(
    key: str, value: Callable[[Tensor], Tensor | None]
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        new = value(tensors[key])
        del tensors[key]
        if new is not None:
            tensors[key] = new

    return change


HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "not json": lambda m, t: "{",
    "nested": lambda m, t: "[" * 100_000,
    "a list": lambda m, t: "[]",
    "another format": top("format", "other"),
    "a later version": top("version", 2),
    "layers as a list": top("layers", []),
    "no layers": top("layers", {}),
    "aliases of nothing": top("aliases", {"x": "y"}),
    "aliases over a tensor": top("aliases", {"0.bias": "0.weight"}),
    "aliases as text": top("aliases", "0.bias"),
    "unknown layer": lambda m, t: m["layers"].update({"__class__": {"type": "Linear", "out": 1, "in": 1}}),
    "layer as text": lambda m, t: m["layers"].update({"7": "Linear"}),
    "huge": setting("7", "out", 2**40),
    "large": setting("7", "out", 2**30),
    "negative": setting("7", "out", -16),
    "float": setting("7", "out", 48.0),
    "bool": setting("7", "out", True),
    "text": setting("7", "out", "48"),
    "unknown type": setting("7", "type", "Embedding"),
    "type as a list": setting("7", "type", ["Linear"]),
    "another kind": setting("7", "type", "BlockSparseConv2d"),
    "plain kind": setting("7", "type", "BatchNorm1d"),
    "unknown key": setting("7", "eval", "print()"),
    "block of one": setting("7", "block", [1, 1]),
    "block as text": setting("7", "block", "16"),
    "no block": setting("7", "block", None),
    "capacity of zero": setting("7", "capacity", 0),
    "capacity beyond": setting("7", "capacity", 10**6),
    "groups": setting("3", "groups", 2),
    "groups that do not divide": setting("3", "groups", 7),
    "missing tensor": tensor("7.bias", lambda t: None),
    "wrong shape": tensor("7.bias", lambda t: t[:-1].clone()),
    "slot twice": tensor("7.layout.slot_of_block", torch.zeros_like),
    "slot beyond": tensor("7.layout.slot_of_block", lambda t: t + 1000),
    "slot below": tensor("7.layout.slot_of_block", lambda t: t - 1000),
    "slots as floats": tensor("7.layout.slot_of_block", lambda t: t.float()),
    "values as integers": tensor("7.values", lambda t: t.nan_to_num().int()),
    "weights as integers": tensor("0.weight", lambda t: t.int()),
    "unknown tensor": lambda m, t: t.update({"extra": torch.zeros(1)}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("target", [network, swapped])
def test_hostile_files_are_refused_and_leave_the_model_alone(
    change: Callable[[dict[str, Any], dict[str, Tensor]], Any],
    target: Callable[[], nn.Sequential],
    tmp_path: Path,
) -> None:
    path = corrupted(save(pruned(), tmp_path), change)
    model = target()
    modules = [id(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError):
        load(model, path)
    assert modules == [id(m) for m in model.modules()]
    now = model.state_dict()
    assert set(now) == set(state) and all(torch.equal(now[k], v) for k, v in state.items())


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = save(pruned(), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="written by"):
        load(network, path)
    path.write_bytes(b"\x80\x04" + b"x" * 100)
    with pytest.raises(ValueError, match="written by"):
        load(network, path)
    save_file({"0.weight": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="manifest"):
        load(network, path)
    with pytest.raises(ValueError, match="another's"):
        load(Tied, save(pruned(), tmp_path))


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="as an nn"):
        save({}, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="function"):
        load(3, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="returns"):
        load(lambda: 3, "x")  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="meta"):
        save(nn.Linear(2, 2, device="meta"), "x")


def test_state_dicts_carry_the_structure() -> None:
    """The usual 'keep the best, restore it': into the model that went on shrinking, and into a fresh one."""
    model = pruned()
    handles = add_structure_hooks(model)
    x = torch.randn(INPUT)
    expected = outputs(model, x)
    best = copy.deepcopy(model.state_dict())
    kill(model[9], rows=[2], columns=[1])
    kill(model[7], rows=[1])
    example = ExampleInputs.of(x)
    assert cut_dead_neurons(model, find_groups(model, example), example).neurons == {
        "3": 16,
        "7": 16,
        "9": 16,
    }
    layer = model[7]
    model.load_state_dict(best)
    assert model[7] is layer and torch.equal(outputs(model, x), expected)
    fresh = network()
    add_structure_hooks(fresh)
    fresh.load_state_dict(best)
    assert isinstance(fresh[3], BlockSparseConv2d) and torch.equal(outputs(fresh, x), expected)
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
    kill(source, rows=[1])
    x = torch.randn(3, 64)
    loaded = load(nn.Linear(64, 48), save(source, tmp_path))
    assert isinstance(loaded, BlockSparseLinear) and torch.equal(loaded(x), source(x))
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
