"""What a layer has of its own that a block-sparse one would not carry on: patches, parts, hooks, names."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_HARMLESS = {"_compiled_call_impl", "extra_repr", "reset_parameters"}
_OWN_INSTANCE_ATTRIBUTES = {"values", "layout", "tap", "probe", "reads", "copy_watch", "pad_before", "_plain"}
_STATE_HOOKS = ("_state_dict_hooks", "_load_state_dict_pre_hooks")


def own_behaviour(layer: nn.Module, sparse_type: type[nn.Module]) -> str:
    """Why ``layer``, of exactly a plain type, cannot become a ``sparse_type``; empty where it can."""
    plain_type = type(layer)
    if name := _patched_method(layer):
        by = " (of accelerate)" if hasattr(layer, "_hf_hook") else ""
        return f"its {name} was replaced on the instance{by}"
    if not _is_torchs(plain_type, "forward") or "__call__" in vars(plain_type):
        return f"nn.{plain_type.__name__}'s forward was replaced for all layers"
    parts = {**layer._parameters, **layer._buffers, **layer._modules}
    if others := sorted(set(parts) - {"weight", "bias"}):
        return f"it has parts of its own: {', '.join(others)}"
    usual = set(dir(plain_type)) | set(vars(nn.Module())) | {"weight", "bias"}
    names = (set(dir(sparse_type)) - usual) | _OWN_INSTANCE_ATTRIBUTES
    settings = {"in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride"}
    settings |= {"groups", "padding_mode"}
    if taken := sorted(set(vars(layer)) & (names - settings)):
        return f"it has attributes that a block-sparse layer uses: {', '.join(taken)}"
    if any(getattr(layer, hooks) for hooks in _STATE_HOOKS):
        return "it has hooks on its state dict, which would see blocks instead of the weight"
    if _has_gradient_hook(layer.weight):
        return "its weight has a gradient hook, which would see blocks instead of the weight"
    return ""


def _patched_method(layer: nn.Module) -> str:
    for name, value in vars(layer).items():
        if callable(value) and name not in _HARMLESS and callable(getattr(type(layer), name, None)):
            return name
    return ""


def _is_torchs(plain_type: type[nn.Module], method: str) -> bool:
    code = getattr(getattr(plain_type, method), "__code__", None)
    file = nn.modules.linear.__file__ if plain_type is nn.Linear else nn.modules.conv.__file__
    return code is not None and code.co_filename == file


def _has_gradient_hook(weight: Any) -> bool:
    hooks = getattr(weight, "_backward_hooks", None) or {}
    return any(not type(hook).__module__.startswith("dynaprune.") for hook in hooks.values())


def weights_in_functions(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Ids of tensors that functions hanging on modules of ``model`` hold, with where they hang.

    A closure or a ``functools.partial`` over ``layer.weight`` would go on with the blocks.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for tensor in _held_tensors(value, 3):
                yield id(tensor), f"{path}.{name}".strip(".")


def _held_tensors(value: Any, depth: int, *, inside: bool = False) -> Iterator[Tensor]:
    """Tensors in closures, defaults and partial arguments; containers count within these only."""
    if depth < 0:
        return
    if isinstance(value, Tensor):
        if inside:
            yield value
        return
    held: list[Any] = []
    if isinstance(value, functools.partial):
        held, inside = [value.func, *value.args, *value.keywords.values()], True
    elif isinstance(value, (list, tuple)):
        held = list(value) if len(value) < 10_000 else []
    elif isinstance(value, Mapping):
        held = list(value.values()) if len(value) < 10_000 else []
    elif closure := getattr(value, "__closure__", None):
        held, inside = [cell.cell_contents for cell in closure if _is_filled(cell)], True
        held += [*(getattr(value, "__defaults__", None) or ())]
    for each in held:
        yield from _held_tensors(each, depth - 1, inside=inside)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
