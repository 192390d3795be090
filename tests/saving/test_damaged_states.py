"""What passes through other people's files is verified too: the Trainer's, accelerate's and Lightning's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dynaprune
from dynaprune.integrations.lightning import DynaPruneLightningCallback
from dynaprune.nn import BlockSparseLayer, swap_layers
from dynaprune.saving.carried import carry_structure
from dynaprune.saving.checksum import checksum_of, verify

STATE = {"step": 7, "rate": 0.1, "text": "a", "scores": [torch.arange(3.0)], "none": None}


def carrying() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    swap_layers(model, 8)
    carry_structure(model, state=lambda: STATE, loaded=lambda found: None)
    return model


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_each_byte_that_is_carried_counts() -> None:
    states, model = frozen(carrying()), carrying()
    before = frozen(model)
    carried = [key for key in states if key.startswith("_dynaprune.")]
    assert {"_dynaprune.structure", "_dynaprune.state", "_dynaprune.state.0", "_dynaprune.checksum"} == set(
        carried
    )
    for key in carried:
        for place in range(states[key].numel() * states[key].element_size()):
            damaged = {name: value.clone() for name, value in states.items()}
            damaged[key].view(torch.uint8)[place] ^= 1 << place % 8
            with pytest.raises(ValueError):
                model.load_state_dict(damaged)
    now = frozen(model)
    assert all(torch.equal(now[key], value) for key, value in before.items())
    model.load_state_dict({name: value.clone() for name, value in states.items()})


@pytest.mark.parametrize("change", ["slots", "renamed", "more", "checksums"])
def test_other_damage_is_refused(change: str) -> None:
    states, model = frozen(carrying()), carrying()
    if change == "slots":
        slots = states["0.layout.slot_of_block"]
        slots[0, 0], slots[1, 1] = int(slots[1, 1]), int(slots[0, 0])
    elif change == "renamed":
        states["_dynaprune.checksul"] = states.pop("_dynaprune.checksum")
    elif change == "more":
        states["_dynaprune.state.1"] = torch.ones(1)
    else:
        states["_dynaprune.checksum"] = torch.tensor(list(b"[]"), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"checksum|expected a structure"):
        model.load_state_dict(states)


def test_what_was_written_before_there_were_checksums_loads() -> None:
    states, model = frozen(carrying()), carrying()
    del states["_dynaprune.checksum"]
    with torch.no_grad():
        model[0].values.zero_()  # type: ignore[operator, union-attr]
    model.load_state_dict(states)
    assert torch.equal(model[0].values, states["0.values"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes))
    dynaprune.DynaPruneCallback(model, dynaprune.PruningConfig(block_size=8))
    for layer in model.modules():
        if isinstance(layer, BlockSparseLayer):
            layer.layout.release_(torch.rand(layer.layout.mask.shape) < 1 / 3)
    model.save_pretrained(folder)
    return folder


def copied(saved: Path, to: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        (to / name).write_bytes((saved / name).read_bytes())
    return json.loads((to / "config.json").read_text()), load_file(to / "model.safetensors")


def load_from(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return transformers.BertForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["capacity", "out", "slots", "structure checksum", "slots checksum"])
def test_a_damaged_pretrained_folder_is_refused(part: str, saved: Path, tmp_path: Path) -> None:
    config, tensors = copied(saved, tmp_path)
    entry = config["quantization_config"]
    name, layer = next((n, e) for n, e in entry["structure"]["layers"].items() if "capacity" in e)
    key = f"{name}.layout.slot_of_block"
    if part in ("capacity", "out"):
        layer[part] -= 1
    elif part == "slots":
        live = (tensors[key] >= 0).nonzero()
        first, second = tuple(live[0]), tuple(live[1])
        tensors[key][first], tensors[key][second] = int(tensors[key][second]), int(tensors[key][first])
    elif part == "structure checksum":
        entry["checksums"]["structure"] = "0" * 64
    else:
        entry["checksums"]["slots"][key] = "0" * 64
    said = "expected the widths of this model" if part == "out" else "checksum"
    with pytest.raises(ValueError, match=said):
        load_from(tmp_path, config, tensors)


def test_a_pretrained_folder_without_checksums_loads(saved: Path, tmp_path: Path) -> None:
    config, tensors = copied(saved, tmp_path)
    del config["quantization_config"]["checksums"]
    model = load_from(tmp_path, config, tensors)
    again = copy.deepcopy(model)
    again.save_pretrained(tmp_path / "again")
    fresh = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == fresh


def test_the_state_in_a_lightning_checkpoint_is_verified() -> None:
    state = {"pruner": {"step": 3, "scores": {"0": torch.arange(4.0)}}, "standing": 1}
    whole = {**state, "checksum": checksum_of(state)}
    DynaPruneLightningCallback().load_state_dict(copy.deepcopy(whole))
    DynaPruneLightningCallback().load_state_dict(state)
    DynaPruneLightningCallback().load_state_dict({})
    for change in (lambda s: s["pruner"].update(step=4), lambda s: s["pruner"]["scores"]["0"].add_(1)):
        damaged = copy.deepcopy(whole)
        change(damaged)
        with pytest.raises(ValueError, match="does not agree with its checksum"):
            DynaPruneLightningCallback().load_state_dict(damaged)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, True),
        (1, 1.0),
        (1, "1"),
        (0.0, -0.0),
        ([1, [2]], [[1], 2]),
        ({"a": 1}, {"b": 1}),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        ([], {}),
        (["ab", "c"], ["a", "bc"]),
    ],
)
def test_different_values_have_different_checksums(left: Any, right: Any) -> None:
    assert checksum_of(left) != checksum_of(right)
    verify(left, checksum_of(left), "it")
    with pytest.raises(ValueError, match="it does not agree"):
        verify(left, checksum_of(right), "it")


def test_equal_values_have_equal_checksums() -> None:
    base = torch.arange(6.0).view(2, 3)
    assert checksum_of({"a": 1, "b": (1, 2)}) == checksum_of({"b": [1, 2], "a": 1})
    assert checksum_of(base.t()) == checksum_of(base.t().contiguous())
    assert checksum_of({"a": float("nan")}) == checksum_of({"a": float("nan")})
