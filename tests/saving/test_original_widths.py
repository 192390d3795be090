"""A file loads into the network that it was pruned from, not into one that was built with other widths."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import swap_layers
from dynaprune.saving.carried import carry_structure
from dynaprune.saving.manifest import structure_manifest
from dynaprune.saving.reshape import CARRIED_PREFIX, METADATA_KEY, add_structure_hooks
from dynaprune.saving.tensor_file import read_tensors, write_tensors
from tests.neurons.cutting import kill
from tests.rounding import agree

WIDTHS: dict[str, int] = {
    "words": 50,
    "positions": 12,
    "embedding": 32,
    "hidden": 64,
    "second": 48,
    "channels": 32,
    "filters": 48,
    "classes": 10,
}


class Net(nn.Module):
    """Every kind of width: embeddings, a norm over features, hidden layers, convolutions and their norm."""

    def __init__(self, **changes: int) -> None:
        super().__init__()
        w = {**WIDTHS, **changes}
        self.words, self.positions = (nn.Embedding(w[n], w["embedding"]) for n in ("words", "positions"))
        self.norm = nn.LayerNorm(w["embedding"])
        self.first, self.second = nn.Linear(w["embedding"], w["hidden"]), nn.Linear(w["hidden"], w["second"])
        self.mix = nn.Conv1d(w["second"], w["channels"], 1)
        self.batch_norm = nn.BatchNorm1d(w["channels"])
        self.filter = nn.Conv1d(w["channels"], w["filters"], 3)
        self.head = nn.Linear(w["filters"], w["classes"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.words(x) + self.positions.weight[: x.shape[1]])
        x = torch.relu(self.second(torch.relu(self.first(x)))).transpose(1, 2)
        x = torch.relu(self.filter(torch.relu(self.batch_norm(self.mix(x)))))
        return self.head(x.mean(2))


def words(rows: int = 3) -> Tensor:
    return torch.randint(0, 50, (rows, 8))


def cut(model: nn.Module, **dead: list[int]) -> nn.Module:
    """Let the block rows of the layers named die (of ``NAME_in`` the columns), and cut their neurons."""
    for name, blocks in dead.items():
        layer = name.removesuffix("_in")
        kill(model, layer, **{"rows" if layer == name else "columns": blocks})
    example = ExampleInputs.of(words())
    assert cut_dead_neurons(model, find_groups(model, example), example).neurons
    return model


def pruned(**changes: int) -> nn.Module:
    """A block of 16 is gone from the first hidden layer, and one from the channels between convolutions."""
    torch.manual_seed(3)
    model = Net(**changes)
    swap_layers(model, 16, include=["first", "second", "mix", "filter"])
    cut(model, first=[1], filter_in=[0])
    layers = structure_manifest(model)["layers"]
    assert (
        layers["first"]["out"] == {**WIDTHS, **changes}["hidden"] - 16 and layers["batch_norm"]["out"] == 16
    )
    return model


def answers(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = {key: value for key, value in model.state_dict().items() if not key.startswith(CARRIED_PREFIX)}
    assert set(after) == set(before) and all(torch.equal(after[key], value) for key, value in before.items())


def by_file(source: nn.Module, folder: Path) -> Callable[[nn.Module], Any]:
    path = dynaprune.save(source, folder / "net.safetensors")
    return lambda target: dynaprune.load(target, path)


def by_metadata(source: nn.Module, folder: Path) -> Callable[[nn.Module], Any]:
    add_structure_hooks(source)
    torch.save(source.state_dict(), folder / "state.pt")

    def load(target: nn.Module) -> Any:
        add_structure_hooks(target)
        return target.load_state_dict(torch.load(folder / "state.pt", weights_only=True))

    return load


def by_tensors(source: nn.Module, _: Path) -> Callable[[nn.Module], Any]:
    carry_structure(source)
    state = {key: value.clone() for key, value in source.state_dict().items()}

    def load(target: nn.Module) -> Any:
        carry_structure(target)
        return target.load_state_dict(dict(state))

    return load


WAYS = [by_file, by_metadata, by_tensors]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": 5}, "'head' has 5 outputs here and 10 in what is loaded"),
        ({"classes": 20}, "'head' has 20 outputs here and 10 in what is loaded"),
        ({"classes": 1}, "'head' has 1 outputs here and 10"),
        ({"second": 64}, "'second' has 64 outputs here and 48"),
        ({"hidden": 96}, "'first' has 96 outputs here and 48 in what is loaded, built with 64"),
        ({"hidden": 32}, "'first' has 32 outputs here and 48 in what is loaded, built with 64"),
        ({"channels": 64}, "'mix' has 64 outputs here and 16 in what is loaded, built with 32"),
        ({"filters": 32}, "'filter' has 32 outputs here and 48"),
        ({"embedding": 48}, "'first' has 48 inputs here and 32"),
        ({"words": 60}, "words.weight"),
        ({"positions": 16}, "positions.weight"),
    ],
)
def test_other_widths_are_refused_and_the_model_stays(
    way: Any, changes: dict[str, int], named: str, tmp_path: Path
) -> None:
    load = way(pruned(), tmp_path)
    target = Net(**changes)
    before = state_of(target)
    with pytest.raises(ValueError, match=named):
        load(target)
    assert_untouched(target, before)
    assert target.head.out_features == {**WIDTHS, **changes}["classes"]


@pytest.mark.parametrize("way", WAYS)
def test_the_network_as_it_was_built_or_as_it_is_saved_loads(way: Any, tmp_path: Path) -> None:
    source, x = pruned(), words()
    expected = answers(source, x)
    load = way(source, tmp_path)
    for target in (Net(), Net(hidden=48, channels=16), pruned()):
        load(target)
        assert agree(answers(target, x), expected)
        assert structure_manifest(target) == structure_manifest(source)


def test_models_that_are_cut_otherwise_load(tmp_path: Path) -> None:
    source, x = pruned(), words()
    path, expected = dynaprune.save(source, tmp_path), answers(source, x)
    for further in (cut(copy.deepcopy(source), first=[0], second=[1]), cut(pruned(), filter=[0])):
        assert structure_manifest(further) != structure_manifest(source)
        assert agree(answers(dynaprune.load(further, path), x), expected)
    foreign = pruned(hidden=96)
    assert foreign.first.layout.out_features == 80  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match="'first' has 96 outputs here and 48 in what is loaded, built with 64"
    ):
        dynaprune.load(foreign, path)


def test_the_widths_of_the_first_session_stay_the_original_ones(tmp_path: Path) -> None:
    dynaprune.save(pruned(), tmp_path)
    second = cut(dynaprune.load(Net, tmp_path), first=[0], filter=[2])
    layers = structure_manifest(second)["layers"]
    assert (layers["first"]["out"], layers["first"]["original_out"]) == (32, 64)
    assert (layers["second"]["in"], layers["second"]["original_in"]) == (32, 64)
    assert (layers["head"]["in"], layers["head"]["original_in"]) == (32, 48)
    assert "original_out" not in layers["head"] and "original_out" not in layers["second"]
    x, path = words(), dynaprune.save(second, tmp_path / "second.safetensors")
    expected = answers(second, x)
    finished = dynaprune.swap_back(copy.deepcopy(second))
    for target in (Net(), pruned(), finished):
        assert agree(answers(dynaprune.load(target, path), x), expected)
    with pytest.raises(
        ValueError, match="'first' has 48 outputs here and 32 in what is loaded, built with 64"
    ):
        dynaprune.load(Net(hidden=48), path)


def test_a_cut_that_is_taken_back_leaves_no_trace() -> None:
    from dynaprune.neurons.surgery import Surgery

    model = Net()
    swap_layers(model, 16, include=["first", "second"])
    before = structure_manifest(model)
    surgery, none = Surgery(), torch.zeros(32, dtype=torch.bool)
    surgery.cut_(model.first, torch.arange(64) < 16, none)
    surgery.cut_(model.first, torch.arange(48) < 16, none)
    assert structure_manifest(model)["layers"]["first"]["original_out"] == 64
    surgery.undo()
    assert structure_manifest(model) == before
    surgery.cut_(model.first, torch.arange(64) < 16, none)
    assert structure_manifest(model)["layers"]["first"]["original_out"] == 64


def test_another_head_after_loading(tmp_path: Path) -> None:
    """What the error advises."""
    dynaprune.save(pruned(), tmp_path)
    task = dynaprune.load(Net, tmp_path)
    task.head = nn.Linear(task.head.in_features, 5)  # type: ignore[union-attr, arg-type]
    x, path = words(), dynaprune.save(task, tmp_path / "task.safetensors")
    assert agree(answers(dynaprune.load(Net(classes=5), path), x), answers(task, x))


def old_file(path: Path) -> Path:
    """As version 1 wrote its manifest: without the original widths."""
    found = read_tensors(path)
    manifest = {**json.loads(found.metadata[METADATA_KEY]), "version": 1}
    for entry in manifest["layers"].values():
        entry.pop("original_out", None), entry.pop("original_in", None)
    write_tensors(path, found.tensors, {METADATA_KEY: json.dumps(manifest)})
    return path


def test_an_old_file_loads_into_what_it_can_be_pruned_from(tmp_path: Path) -> None:
    source, x = pruned(), words()
    expected, path = answers(source, x), old_file(dynaprune.save(source, tmp_path))
    for target in (Net(), Net(hidden=48, channels=16), cut(copy.deepcopy(source), first=[0])):
        assert agree(answers(dynaprune.load(target, path), x), expected)
        assert target.first.layout.out_features == 48  # type: ignore[union-attr]
    again = dynaprune.load(Net, path)
    assert structure_manifest(again)["layers"]["first"]["original_out"] == 64
    for changes, named in [({"classes": 5}, "head"), ({"hidden": 32}, "first"), ({"channels": 8}, "mix")]:
        with pytest.raises(ValueError, match=f"'{named}' has {next(iter(changes.values()))} outputs here"):
            dynaprune.load(Net(**changes), path)


@pytest.mark.parametrize("changes", [{"classes": 5}, {"classes": 20}, {"embedding": 48}])
def test_an_old_file_of_an_uncut_network_takes_no_other_width(
    changes: dict[str, int], tmp_path: Path
) -> None:
    source = Net()
    swap_layers(source, 16, include=["first", "second"])
    path = old_file(dynaprune.save(source, tmp_path))
    dynaprune.load(Net, path)
    with pytest.raises(ValueError, match="expected the widths of this model"):
        dynaprune.load(Net(**changes), path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("original_out", 8, "original widths from"),
        ("original_in", 1.5, "expected original_in from 1"),
        ("original_out", True, "expected original_out from 1"),
        ("original_out", 2**40, "expected original_out from 1"),
        ("original_size", 64, "expected the keys"),
    ],
)
def test_original_widths_that_cannot_be(key: str, value: Any, said: str, tmp_path: Path) -> None:
    path = dynaprune.save(pruned(), tmp_path)
    found = read_tensors(path)
    manifest = json.loads(found.metadata[METADATA_KEY])
    manifest["layers"]["first"][key] = value
    write_tensors(path, found.tensors, {METADATA_KEY: json.dumps(manifest)})
    with pytest.raises(ValueError, match=said):
        dynaprune.load(Net, path)
    with pytest.raises(ValueError, match="expected the keys"):  # version 1 has no such keys
        manifest["version"] = 1
        write_tensors(path, found.tensors, {METADATA_KEY: json.dumps(manifest)})
        dynaprune.load(Net, path)
