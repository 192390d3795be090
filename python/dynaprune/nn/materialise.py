"""Modules on the meta device get memory and initial values, each by its own initialiser."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn.block_sparse import BlockSparseLayer

_OWN = ("reset_parameters", "_reset_parameters")
_OF_OTHERS = "_init_weights"


def on_meta(module: nn.Module) -> dict[str, Tensor]:
    """The module's own Parameters and buffers that are on the meta device, by name."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None and tensor.is_meta}


def children_first(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module inside, and then the module itself, with their paths."""
    for name, child in module.named_children():
        yield from children_first(child, f"{path}.{name}" if path else name)
    yield path, module


@torch.no_grad()
def materialise_(model: nn.Module, path: str, device: torch.device) -> None:
    """Give one module's own meta tensors memory on ``device``, and the values that it is made with.

    These come from its ``reset_parameters``, and then from the ``_init_weights(module)`` of the nearest
    module around it that has one (transformers, nanoGPT): what constructors would have called, in that order.
    Parameters and buffers stay the same objects, so that tied ones stay tied.

    Raises:
        ValueError: a tensor that they leave as it was, or one of a type of its own.
    """
    module = model.get_submodule(path)
    fresh = on_meta(module)
    for name, tensor in fresh.items():
        _give_memory_(tensor, f"{path}.{name}".lstrip("."), device)
    versions = {name: tensor._version for name, tensor in fresh.items()}
    initialise_(model, path)
    own = {**module._parameters, **module._buffers}
    left = [name for name, tensor in fresh.items() if _untouched(tensor, own.get(name), versions[name])]
    if left:
        raise ValueError(
            f"cannot give {f'{path}.{left[0]}'.lstrip('.')} a value: {type(module).__name__} has no "
            "reset_parameters that sets it, and no module around it an _init_weights that does. Add one, or "
            "build the model with this tensor on a real device (accelerate's init_empty_weights keeps "
            "buffers real); then build it anew"
        )


@torch.no_grad()
def initialise_(model: nn.Module, path: str) -> None:
    """Call what constructors would have called to give a module, and what is inside of it, its values.

    Of block-sparse layers inside the blocks that live get theirs.
    """
    module = model.get_submodule(path)
    with ExitStack() as stack:
        for layer in module.modules():
            if isinstance(layer, BlockSparseLayer):
                stack.enter_context(_dense_weight_among_parameters(layer))
        for initialise in _initialisers(model, path):
            initialise()


@contextmanager
def _dense_weight_among_parameters(layer: BlockSparseLayer) -> Iterator[None]:
    """Inside, a loop over parameters meets the dense weight, writable, where it would meet the blocks."""
    parameters = layer._parameters
    others = {name: tensor for name, tensor in parameters.items() if name != "values"}
    layer._parameters = {"weight": layer.weight, **others}  # type: ignore[dict-item]
    try:
        yield
    finally:
        layer._parameters = parameters


def _give_memory_(tensor: Tensor, name: str, device: torch.device) -> None:
    is_parameter = isinstance(tensor, nn.Parameter)
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"expected a plain tensor on the meta device, got {name} as {type(tensor).__name__}")
    empty = torch.empty_like(tensor, device=device)
    _poison_(empty)
    new = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    new.__dict__.update(tensor.__dict__)
    torch.utils.swap_tensors(tensor, new)


def _poison_(tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(_unlikely(tensor.dtype))


def _unlikely(dtype: torch.dtype) -> int:
    limits = torch.iinfo(dtype)
    return limits.min or limits.max


def _untouched(tensor: Tensor, now: Tensor | None, version: int) -> bool:
    """Whether anything is left of what :func:`_poison_` wrote, or of meta."""
    if now is None or now.is_meta or now is not tensor:
        return now is not None and now.is_meta
    if now.is_floating_point() or now.is_complex():
        return bool(now.isnan().any())
    if now.dtype != torch.bool:
        return bool((now == _unlikely(now.dtype)).any())
    return now._version == version and now.numel() > 0


def _initialisers(model: nn.Module, path: str) -> Iterator[Callable[[], Any]]:
    module = model.get_submodule(path)
    for name in (*_OWN, _OF_OTHERS):
        own = getattr(module, name, None)
        if callable(own) and not inspect.signature(own).parameters:
            yield own
    around = path
    while True:
        init: Any = getattr(model.get_submodule(around), _OF_OTHERS, None)
        if callable(init) and inspect.signature(init).parameters:
            yield functools.partial(init, module)
            return
        if not around:
            return
        around = around.rpartition(".")[0]
