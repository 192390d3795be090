"""Copies of the model (averages, teachers): kept in step with the pruned model, or found out to be stale."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer, swap_back
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune.nn.swap import SPARSE_TYPES, _replace


class CopyWatch:
    """Sits on a layer and learns of its deep copies, so that one that goes on being updated can be found.

    Attributes:
        copies: weak references to deep copies of the layer that are alive.
        version: the copy's own weights' version when it was last loaded as a whole.
        owned: whether a pruner is attached to the layer.
    """

    def __init__(self, layer: BlockSparseLayer | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else None
        self.copies: list[weakref.ref[Any]] = []
        self.version = 0
        self.owned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyWatch:
        layer = self._layer() if self._layer is not None else None
        twin = memo.get(id(layer)) if layer is not None else None
        if twin is not None:
            self.copies.append(weakref.ref(twin))
        return CopyWatch(twin)

    def __reduce__(self) -> Any:
        return CopyWatch, ()


def _note_load(module: nn.Module, _: Any) -> None:
    watch = getattr(module, "copy_watch", None)
    if isinstance(watch, CopyWatch):
        watch.version = module.values._version


def watch_copies(layers: Mapping[str, BlockSparseLayer]) -> None:
    """Start to notice deep copies of the layers."""
    for layer in layers.values():
        watch = CopyWatch(layer)
        watch.owned = True
        layer.copy_watch = watch  # type: ignore[assignment]
        layer.register_load_state_dict_post_hook(_note_load)


class Followers:
    """The copies that follow, by layer name; held weakly."""

    def __init__(self) -> None:
        self._copies: list[dict[str, weakref.ref[BlockSparseLayer]]] = []
        self._roots: list[weakref.ref[nn.Module]] = []

    def add(self, copy: nn.Module, layers: Mapping[str, BlockSparseLayer]) -> None:
        """Let ``copy`` follow: a deep copy of the model or an ``AveragedModel``, from before or after attach.

        Raises:
            TypeError: not a module. ValueError: a layer that is missing or has another structure.
        """
        if not isinstance(copy, nn.Module):
            raise TypeError(f"expected the copy as an nn.Module, got {type(copy).__name__}")
        modules = dict(copy.named_modules())
        prefix = next(
            (p for p in ("", "module.", "_orig_mod.") if all(p + n in modules for n in layers)), None
        )
        if prefix is None:
            missing = next(n for n in layers if n not in modules)
            raise ValueError(
                f"expected a copy of the model with a layer {missing!r}, got {type(copy).__name__} without it"
            )
        for name, layer in layers.items():
            _check_like(name, modules[prefix + name], layer)
        followed: dict[str, weakref.ref[BlockSparseLayer]] = {}
        for name, layer in layers.items():
            twin = modules[prefix + name]
            if not isinstance(twin, BlockSparseLayer):
                twin = _swapped(copy, twin, layer)
            followed[name] = weakref.ref(twin)
        self._copies.append(followed)
        self._roots.append(weakref.ref(copy.get_submodule(prefix.removesuffix("."))))

    def of(self, name: str) -> list[BlockSparseLayer]:
        """The living followers of one layer."""
        found = [followed[name]() for followed in self._copies if name in followed]
        return [layer for layer in found if layer is not None]

    def models(self) -> list[nn.Module]:
        """The living followers: for an ``AveragedModel`` the module in it."""
        return [copy for root in self._roots if (copy := root()) is not None]

    def swap_back(self) -> None:
        """Give every follower plain dense layers again."""
        for copy in self.models():
            swap_back(copy)
        self._copies, self._roots = [], []

    def refuse_stale(self, layers: Mapping[str, BlockSparseLayer]) -> None:
        """Raise RuntimeError where a deep copy is being updated (it is an average) but does not follow.

        A copy that was only kept, loaded as a whole, or trains with gradients of its own is none of our
        business.
        """
        for name, layer in layers.items():
            watch = layer.copy_watch
            if not isinstance(watch, CopyWatch):
                continue
            watch.copies = [ref for ref in watch.copies if ref() is not None]
            followed = {id(each) for each in self.of(name)}
            for ref in watch.copies:
                twin = ref()
                if twin is None or id(twin) in followed or twin.values.grad is not None:
                    continue
                if twin.values._version > twin.copy_watch.version:
                    raise RuntimeError(
                        "a copy of the model is being updated without following its structure (layer "
                        f"{name}): an average of weights would mix blocks; call pruner.follow(copy) once, "
                        "right after making the copy"
                    )


def _check_like(name: str, twin: nn.Module, layer: BlockSparseLayer) -> None:
    if isinstance(twin, BlockSparseLayer):
        mine, other = layer.layout, twin.layout
        if other.block != mine.block or other.slot_of_block.shape != mine.slot_of_block.shape:
            raise ValueError(
                f"expected {name} of the copy with the blocks of the model, got {other} for {mine}"
            )
        same: Tensor = other.slot_of_block.to(mine.slot_of_block.device) == mine.slot_of_block
        if other.capacity != mine.capacity or not bool(same.all()):
            raise ValueError(
                f"expected {name} of the copy with the structure that the model has now, got another: let a "
                "copy follow right after making it"
            )
    elif type(twin) not in SPARSE_TYPES or not isinstance(layer, SPARSE_TYPES[type(twin)]):
        raise ValueError(
            f"expected {name} of the copy to be a {type(layer).__name__}, got {type(twin).__name__}"
        )


def _swapped(copy: nn.Module, dense: nn.Module, layer: BlockSparseLayer) -> BlockSparseLayer:
    weight = dense.weight.detach().clone()  # type: ignore[operator]
    twin = SPARSE_TYPES[type(dense)].from_dense(dense, layer.layout.block)
    twin.layout.restore_(layer.layout.slot_of_block.to(twin.values.device), layer.layout.capacity)
    replace_parameter_data_(twin.values, twin.to_slots(weight))
    _replace(copy, dense, twin)
    return twin
