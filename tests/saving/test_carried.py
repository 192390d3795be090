"""States as tensors by name, and state dicts that carry a structure through safetensors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dynaprune
from dynaprune.nn import BlockSparseLinear, swap_layers
from dynaprune.saving.carried import carry_structure, from_tensors, to_tensors
from dynaprune.saving.manifest import structure_manifest
from tests.pruning.attached import batch, loss_of, mlp, settings, sparse_layers
from tests.rounding import agree

STATE: dict[str, Any] = {
    "number": 0.1 + 0.2,
    "whole": 2**60,
    "none": None,
    "flag": True,
    "text": "tensor:0",
    "infinite": math.inf,
    "nested": {"list": [1, {"mask": torch.tensor([True, False])}], "empty": {}},
    "scalar": torch.tensor(3, dtype=torch.int32),
    "double": torch.tensor([[1e-300, -0.0]], dtype=torch.float64),
    "turned": torch.arange(6).view(2, 3).t(),
}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_states_go_through_safetensors_as_they_are(tmp_path: Path) -> None:
    save_file(to_tensors(STATE), tmp_path / "state.safetensors")
    assert same(from_tensors(load_file(tmp_path / "state.safetensors")), STATE)
    assert from_tensors({}) is None


def test_what_has_no_such_form() -> None:
    with pytest.raises(TypeError, match="expected names as keys, got 3"):
        to_tensors({"a": {3: 1}})
    with pytest.raises(TypeError, match="serializable"):
        to_tensors({"a": object()})
    tensors = to_tensors(STATE)
    with pytest.raises(ValueError, match=r"expected a tensor _dynaprune\.state\.0"):
        from_tensors({key: value for key, value in tensors.items() if not key.endswith(".0")})
    with pytest.raises(ValueError, match="expected JSON"):
        from_tensors({"_dynaprune.state": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="uint8"):
        from_tensors({"_dynaprune.state": torch.zeros(3)})


def cut_model() -> nn.Sequential:
    """Trained, compacted, and without some neurons."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = dynaprune.attach(model, optimizer, settings(neurons=True))
    for step in range(24):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    pruner.detach()
    assert pruner.report()["neurons_removed"] > 0
    return model


def test_a_file_of_tensors_gives_another_model_the_structure(tmp_path: Path) -> None:
    model, other, x = cut_model(), mlp(), batch(0)[0]
    for each in (model, other):
        carry_structure(each)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert structure_manifest(other) == structure_manifest(model)
    assert agree(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        mlp().load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    kept = dynaprune.load(mlp, dynaprune.save(model, tmp_path / "plain.safetensors"))
    assert agree(kept(x), model(x)) and not any("_dynaprune" in key for key in kept.state_dict())
    dynaprune.load(other, tmp_path / "plain.safetensors")


def test_copies_carry_the_structure_but_not_the_state() -> None:
    model = cut_model()
    seen: list[Any] = []
    carry_structure(model, state=lambda: {"here": torch.ones(2)}, loaded=seen.append)
    carry_structure(model, state=lambda: {"now": torch.ones(2)}, loaded=seen.append)
    twin = copy.deepcopy(model)
    assert not any("state" in key for key in twin.state_dict())
    twin.load_state_dict(model.state_dict())
    assert seen == []
    model.load_state_dict(twin.state_dict())
    model.load_state_dict(model.state_dict())
    assert seen[0] is None and list(seen[1]) == ["now"] and len(seen) == 2


def test_no_mention_of_the_structure_that_the_code_builds() -> None:
    model = mlp()
    plain = structure_manifest(model)
    carry_structure(model, plain=plain)
    assert set(model.state_dict()) == set(mlp().state_dict())
    swap_layers(model, 8)
    assert "_dynaprune.structure" in model.state_dict()


def test_states_that_do_not_fit_change_nothing() -> None:
    model = mlp()
    swap_layers(model, 8)
    carry_structure(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"expected a checkpoint with block-sparse layers, got .* 0\.weight"):
        model.load_state_dict(mlp().state_dict(), strict=False)
    wrong = dict(model.state_dict())
    wrong["0.values"] = wrong["0.values"][1:]
    with pytest.raises(ValueError, match=r"expected 0\.values of shape \(32, 8, 8\), got \(31, 8, 8\)"):
        model.load_state_dict(wrong)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in before.items())
    assert all(isinstance(layer, BlockSparseLinear) for layer in sparse_layers(model))
