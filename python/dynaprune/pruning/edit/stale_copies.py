"""Find copies of the model that go on being averaged without following its structure.

An average of values by slot mixes blocks once the model's slots and the copy's differ. Writes through
``.data`` move no version, so a copy is known to be updated by its values: a sample of them is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer

_SAMPLES = 1024
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CopyWatch:
    """Sits on a layer, as ``copy_watch``, and learns of its deep copies; each of these has one of its own.

    Attributes:
        copies: of the model's own layer: weak references to the deep copies that are alive.
        owned: whether a pruner is attached to the layer.
        follows: whether the layer belongs to a copy that follows.
        trains: whether the layer, a copy, got gradients: then it is a network of its own.
    """

    def __init__(self, layer: BlockSparseLayer | None = None, origin: BlockSparseLayer | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else None
        self._origin = weakref.ref(origin) if origin is not None else None
        self.copies: list[weakref.ref[Any]] = []
        self.owned = self.follows = self.trains = False
        self._known: Tensor | None = None

    def origin(self) -> BlockSparseLayer | None:
        """The model's layer that this one is a copy of, while it lives and is block-sparse."""
        layer = self._origin() if self._origin is not None else None
        return layer if isinstance(layer, BlockSparseLayer) else None

    def note(self, layer: BlockSparseLayer) -> None:
        """Take the layer's values as they are now for the copied ones."""
        self._known = _sample(layer.values)

    def updated(self, layer: BlockSparseLayer) -> bool:
        """Whether values were written since the copy was made, or loaded as a whole. Syncs."""
        now = _sample(layer.values)
        if self._known is None or now is None:
            return False
        if torch.equal(_bits(now), _bits(self._known.to(now.device, now.dtype))):
            self._known = now
            return False
        return True

    def must_follow(self, layer: BlockSparseLayer) -> bool:
        """Whether the layer is one of an average that does not follow."""
        grown_up = self.owned or self.trains or layer.values.grad is not None
        return not self.follows and not grown_up and self.updated(layer)

    def arrived(self, layer: BlockSparseLayer) -> None:
        """Start to watch a layer that a deep copy has just made."""
        if self._layer is None or self._layer() is not layer or self.origin() is None:
            return
        if _refuse_stale_forward not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_refuse_stale_forward)
        if layer.values.requires_grad:
            layer.values.register_hook(_Trains(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyWatch:
        layer = self._layer() if self._layer is not None else None
        twin = memo.get(id(layer)) if layer is not None else None
        if layer is None or twin is None:
            return CopyWatch()
        origin = self.origin() or layer
        watch = CopyWatch(twin, origin)
        watch._known = _sample(layer.values)
        if isinstance(origin.copy_watch, CopyWatch):
            origin.copy_watch.copies.append(weakref.ref(twin))
        return watch

    def __reduce__(self) -> Any:
        return CopyWatch, ()


class _Trains:
    """Notes that a copy gets gradients; holds its watch weakly."""

    def __init__(self, watch: CopyWatch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, _: Tensor) -> None:
        if (watch := self._watch()) is not None:
            watch.trains = True


def watch_copies(layers: Mapping[str, BlockSparseLayer]) -> None:
    """Start to notice deep copies of the layers."""
    for layer in layers.values():
        watch = CopyWatch(layer)
        watch.owned = True
        layer.copy_watch = watch
        layer.register_load_state_dict_post_hook(_note_load)


def refuse_stale(layers: Mapping[str, BlockSparseLayer], *, final: bool = False) -> None:
    """Raise RuntimeError where a deep copy was updated (it is an average) but does not follow. Syncs.

    With ``final``, the structure changes no more: copies that have it need not follow. A copy that was only
    kept, loaded as a whole, or trains with gradients of its own is none of our business.
    """
    for name, layer in layers.items():
        watch = layer.copy_watch
        if not isinstance(watch, CopyWatch):
            continue
        twins = [twin for ref in watch.copies if isinstance(twin := ref(), BlockSparseLayer)]
        watch.copies = [weakref.ref(twin) for twin in twins]
        for twin in twins:
            theirs = twin.copy_watch
            if not isinstance(theirs, CopyWatch) or (final and same_structure(twin, layer)):
                continue
            if theirs.must_follow(twin):
                raise RuntimeError(_stale(f"layer {name}"))


def same_structure(one: BlockSparseLayer, other: BlockSparseLayer) -> bool:
    """Whether the same blocks of both layers have the same slots. Syncs."""
    mine, theirs = one.layout.slot_of_block, other.layout.slot_of_block
    same = mine.shape == theirs.shape and one.layout.capacity == other.layout.capacity
    return same and (mine.is_meta or theirs.is_meta or torch.equal(mine, theirs.to(mine.device)))


def _refuse_stale_forward(module: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    watch = getattr(module, "copy_watch", None)
    if not isinstance(watch, CopyWatch) or not isinstance(module, BlockSparseLayer) or watch.follows:
        return
    origin = watch.origin()
    if origin is not None and not same_structure(module, origin) and watch.must_follow(module):
        raise RuntimeError(_stale(str(module)))


def _note_load(module: nn.Module, _: Any) -> None:
    watch = getattr(module, "copy_watch", None)
    if isinstance(watch, CopyWatch) and isinstance(module, BlockSparseLayer):
        watch.note(module)


def _stale(where: str) -> str:
    return (
        f"a copy of the model is being updated without following its structure ({where}): an average of "
        "weights would mix blocks; call pruner.follow(copy) once, right after making the copy"
    )


def _sample(values: Tensor) -> Tensor | None:
    """Up to 1,024 values, at an odd stride so that no position in the blocks is favoured."""
    if values.is_meta or type(values.data) is not Tensor:
        return None
    flat = values.detach().reshape(-1)
    return flat[:: (flat.numel() // _SAMPLES) | 1].clone()


def _bits(sample: Tensor) -> Tensor:
    return sample.view(_WORDS[sample.element_size()])
