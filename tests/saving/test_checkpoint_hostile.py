"""Checkpoints that are damaged, foreign or hostile are refused, and leave the model alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynaprune.saving.checkpoint import load, save
from dynaprune.saving.reshape import METADATA_KEY
from dynaprune.saving.tensor_file import write_tensors
from tests.saving.checkpoint_cases import Tied, network, pruned, swapped


def corrupted(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """With a checksum that agrees."""
    with safe_open(str(path), "pt") as file:
        manifest = json.loads(file.metadata()[METADATA_KEY])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    text = change(manifest, tensors)
    write_tensors(path, tensors, {METADATA_KEY: text if isinstance(text, str) else json.dumps(manifest)})
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
    "a later version": top("version", 3),
    "a version that is true": top("version", True),
    "a version that is a float": top("version", 1.0),
    "a version that is text": top("version", "1"),
    "a later file": top("file", 3),
    "a file's version that is a float": top("file", 2.0),
    "an older file": top("file", 1),
    "no version of the file": lambda m, t: m.pop("file"),
    "no shapes of weights": lambda m, t: m.pop("weights"),
    "shapes of weights as text": top("weights", "[]"),
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
    "a width inside a ragged block": setting("9", "in", 47),
    "another kernel of the same size": lambda m, t: m["weights"]["3"].__setitem__(slice(2, 4), [1, 9]),
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
