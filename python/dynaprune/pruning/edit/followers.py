"""Copies of the model (averages, teachers) that are kept in step with the pruned model's structure."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dynaprune.neurons.groups import widths_of
from dynaprune.nn import BlockSparseLayer, swap_back
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune.nn.swap import SPARSE_TYPES
from dynaprune.pruning.edit.shadows import Shadow
from dynaprune.pruning.edit.stale_copies import CopyWatch, same_structure
from dynaprune_kernels import BlockLayout

Copy = nn.Module | MutableMapping[Any, Any] | Sequence[Any]
_PREFIXES = ("", "module.", "_orig_mod.")


class Followers:
    """The copies that follow, by layer name. Modules are held weakly, dicts and lists until the end."""

    def __init__(self) -> None:
        self._copies: list[dict[str, weakref.ref[BlockSparseLayer]]] = []
        self._roots: list[weakref.ref[nn.Module]] = []
        self._shadows: list[Shadow] = []

    def add(self, copy: Copy, model: nn.Module, layers: Mapping[str, BlockSparseLayer]) -> None:
        """Let ``copy`` follow, from before or after attach: every deep copy of the model in a module, or
        tensors.

        Args:
            copy: a deep copy of the model, a module that holds some (``AveragedModel``), a dict of tensors by
                the names of parameters or by Parameters, a list in the order of parameters.
            model: that is pruned.
            layers: its block-sparse layers.

        Raises:
            TypeError: neither a module nor tensors. ValueError: a layer that is missing or has another
                structure, or the model itself.
        """
        if isinstance(copy, (MutableMapping, list, tuple)):
            self._shadows.append(Shadow(copy, model, layers))
            return
        if not isinstance(copy, nn.Module):
            raise TypeError(
                f"expected the copy as an nn.Module, a dict or a list of tensors, got {type(copy).__name__}"
            )
        for root in swapped_copies(copy, model, layers):
            followed: dict[str, weakref.ref[BlockSparseLayer]] = {}
            for name in layers:
                twin: Any = root.get_submodule(name)
                if isinstance(twin.copy_watch, CopyWatch):
                    twin.copy_watch.follows = True
                followed[name] = weakref.ref(twin)
            self._copies.append(followed)
            self._roots.append(weakref.ref(root))

    def of(self, name: str) -> list[BlockSparseLayer]:
        """The living followers of one layer."""
        found = [followed[name]() for followed in self._copies if name in followed]
        return [
            *(layer for layer in found if layer is not None),
            *(shadow.layer(name) for shadow in self._shadows),
        ]

    def models(self) -> list[nn.Module]:
        """The living followers: for an ``AveragedModel`` the module in it."""
        modules = [copy for root in self._roots if (copy := root()) is not None]
        return [*modules, *(shadow.stand_in for shadow in self._shadows)]

    @contextmanager
    def in_step(self, model: nn.Module, layers: Mapping[str, BlockSparseLayer]) -> Iterator[None]:
        """While the structure of ``model`` changes: tensors that follow are where :meth:`of` finds them.

        Raises:
            RuntimeError: tensors of another shape than the model's.
        """
        for shadow in self._shadows:
            try:
                shadow.take_in(model, layers)
            except ValueError as error:
                raise RuntimeError(f"a copy of the model is stale: {error}") from error
        try:
            yield
        finally:
            for shadow in self._shadows:
                shadow.give_back()

    def turn_dense(
        self, model: nn.Module, layers: Mapping[str, BlockSparseLayer], names: Sequence[str]
    ) -> None:
        """Make the layers ``names`` of every follower dense, and follow them no longer; ``model`` is as yet
        block-sparse."""
        for shadow in self._shadows:
            shadow.turn_dense(model, layers, names)
        for followed in self._copies:
            for name in names:
                twin = followed.pop(name)()
                if isinstance(twin, BlockSparseLayer):
                    twin.to_dense()

    def swap_back(self, model: nn.Module, layers: Mapping[str, BlockSparseLayer]) -> None:
        """Give every follower plain dense layers again; ``model`` still has block-sparse ones."""
        for root in self._roots:
            if (copy := root()) is not None:
                swap_back(copy)
        for shadow in self._shadows:
            shadow.swap_back(model, layers)
        self._copies, self._roots, self._shadows = [], [], []


def swapped_copies(
    copy: nn.Module, model: nn.Module, layers: Mapping[str, BlockSparseLayer]
) -> list[nn.Module]:
    """The deep copies of ``model`` in ``copy``, with block-sparse layers where the model has them.

    Raises:
        ValueError: as :meth:`Followers.add`.
    """
    roots = _roots(copy, model, layers)
    for root in roots:
        if not layers:
            _check_widths(root, model)
        for name, layer in layers.items():
            _check_like(name, root.get_submodule(name), layer)
    for root in roots:
        for name, layer in layers.items():
            twin = root.get_submodule(name)
            if not isinstance(twin, BlockSparseLayer):
                _swap(twin, layer)
    return roots


def _roots(copy: nn.Module, model: nn.Module, layers: Mapping[str, BlockSparseLayer]) -> list[nn.Module]:
    """The deep copies of ``model`` in ``copy``: modules with its parts, or else what has its layers."""
    names, modules = _parts(model), dict(copy.named_modules())
    alike = [
        module
        for module in modules.values()
        if type(module) is type(model) and module is not model and _parts(module) == names
    ]
    if alike:
        return alike
    prefix = next((p for p in _PREFIXES if all(p + n in modules for n in layers)), None)
    if prefix is None:
        missing = next(n for n in layers if n not in modules)
        raise ValueError(
            f"expected a copy of the model with a layer {missing!r}, got {type(copy).__name__} without it"
        )
    return [copy.get_submodule(prefix.removesuffix("."))]


def _parts(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if not isinstance(module, BlockLayout)}


def _check_widths(root: nn.Module, model: nn.Module) -> None:
    """A copy of a model without block-sparse layers."""
    mine, theirs = widths_of(model), widths_of(root)
    if next(root.parameters(), None) is next(model.parameters(), None):
        raise ValueError("expected a copy of the model, got the model itself: it has the same weights")
    for name, widths in mine.items():
        if theirs.get(name) != widths:
            raise ValueError(
                f"expected {name} of the copy with the {widths} outputs and inputs that the model has now, "
                f"got {theirs.get(name)}: let a copy follow right after making it"
            )


def _check_like(name: str, twin: nn.Module, layer: BlockSparseLayer) -> None:
    if twin is layer or (isinstance(twin, BlockSparseLayer) and twin.values is layer.values):
        raise ValueError(f"expected a copy of the model, got the model itself: {name} has the same weights")
    if isinstance(twin, BlockSparseLayer):
        mine, other = layer.layout, twin.layout
        if other.block != mine.block or other.slot_of_block.shape != mine.slot_of_block.shape:
            raise ValueError(
                f"expected {name} of the copy with the blocks of the model, got {other} for {mine}"
            )
        if not same_structure(twin, layer):
            raise ValueError(
                f"expected {name} of the copy with the structure that the model has now, got another: let a "
                "copy follow right after making it"
            )
    elif type(twin) not in SPARSE_TYPES or not isinstance(layer, SPARSE_TYPES[type(twin)]):
        raise ValueError(
            f"expected {name} of the copy to be a {type(layer).__name__}, got {type(twin).__name__}"
        )


def _swap(dense: Any, layer: BlockSparseLayer) -> None:
    """Give a plain layer of a copy the structure of ``layer``."""
    weight = dense.weight.detach().clone()
    twin = SPARSE_TYPES[type(dense)].from_dense(dense, layer.layout.block)
    twin.layout.restore_(layer.layout.slot_of_block.to(twin.values.device), layer.layout.capacity)
    replace_parameter_data_(twin.values, twin.to_slots(weight))
