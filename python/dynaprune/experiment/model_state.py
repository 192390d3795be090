"""A model and its optimizer as plain values and tensors: structure, contents, and how they lie in memory.

Matrix products round by how their operands lie in memory, and fused optimizers walk over a parameter and its
state side by side: strides are kept beside the values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn.optimizer_state import check_state_shapes
from dynaprune.saving.manifest import structure_manifest
from dynaprune.saving.reshape import apply_structure, check_state, own_state

__all__ = ["load_model_state", "load_optimizer_state", "model_state", "optimizer_state"]


def model_state(model: nn.Module) -> dict[str, Any]:
    """Structure, parameters and persistent buffers of ``model``; no copies where they lie as usual."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in own_state(model).items():
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = first[id(tensor)]
    return {
        "structure": structure_manifest(model),
        "tensors": tensors,
        "aliases": aliases,
        "strides": _odd_strides(tensors),
    }


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give ``model`` the structure and the contents that `model_state` took from one built alike, in place.

    ValueError for the state of another network; the model is then as it was."""
    tensors = dict(state["tensors"])
    tensors.update({alias: tensors[name] for alias, name in state["aliases"].items()})
    check_state(model, state["structure"], tensors)
    for name, stride in state["strides"].items():
        _check_stride(tensors[name], stride)
    apply_structure(model, state["structure"])
    model.load_state_dict(tensors)
    for name, tensor in own_state(model).items():
        stride = state["strides"].get(name, _usual(tensor.shape))
        if tuple(tensor.stride()) != tuple(stride):
            tensor.data = _laid_out(tensor.detach(), stride)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with text for keys, and the strides of its tensors."""
    found = optimizer.state_dict()
    state = {str(number): entries for number, entries in found["state"].items()}
    strides = {number: _odd_strides(entries) for number, entries in state.items()}
    return {"state": state, "groups": found["param_groups"], "strides": strides}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]
) -> None:
    """Give ``optimizer`` the state that `optimizer_state` took of one that trained ``model`` as it is now.

    Raises:
        ValueError: groups of other sizes, strides that no tensor has. RuntimeError: state of another shape
            than its parameter's."""
    groups = [
        {key: tuple(value) if isinstance(mine.get(key), tuple) else value for key, value in group.items()}
        for mine, group in zip(optimizer.param_groups, saved["groups"], strict=True)
    ]
    state = {
        int(number): {
            key: _laid_out(value, saved["strides"][number].get(key, _usual(value.shape)))
            if isinstance(value, Tensor)
            else value
            for key, value in entries.items()
        }
        for number, entries in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    check_state_shapes([optimizer], model.named_parameters())


def _usual(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.empty(tuple(shape), device="meta").stride())


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor of this shape with these strides fills its memory, each place once."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step != expected:
            return False
        expected *= size
    return all(0 <= step <= max(1, math.prod(shape)) for step in stride)


def _odd_strides(values: Mapping[str, Any]) -> dict[str, list[int]]:
    """The strides of the tensors that do not lie as usual, by name."""
    return {
        name: list(value.stride())
        for name, value in values.items()
        if isinstance(value, Tensor)
        and tuple(value.stride()) != _usual(value.shape)
        and _is_dense(value.shape, value.stride())
    }


def _check_stride(tensor: Tensor, stride: Sequence[int]) -> None:
    if len(stride) != tensor.dim() or not _is_dense(tensor.shape, stride):
        raise ValueError(f"expected strides of a tensor of shape {tuple(tensor.shape)}, got {list(stride)}")


def _laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """A copy with these strides; ValueError where they would leave gaps or overlap."""
    _check_stride(tensor, stride)
    laid = torch.empty_strided(tensor.shape, tuple(stride), dtype=tensor.dtype, device=tensor.device)
    return laid.copy_(tensor)
