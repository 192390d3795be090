"""``LayoutTensors``: mask, slots and index of one weight, which fit each other and go along with a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from dynaprune_kernels.geometry import Block, ConvGeometry
from dynaprune_kernels.index import IndexSections, capacity_of_index, column_lists, index_size, sections
from dynaprune_kernels.placement import moved

TENSORS = ("mask", "slot_of_block", "index")
_IN_STATE_DICT: WeakKeyDictionary[nn.Module, tuple[str, ref[Tensor]]] = WeakKeyDictionary()


class LayoutSnapshot(NamedTuple):
    """A layout as it was: its sizes, its tensors, and what these held.

    Attributes:
        tensors: those of :data:`TENSORS`, the layout's own.
        versions: how often each had been written to in place.
        copies: of ``tensors``.
        off_meta: what a layout on the meta device keeps on the host.
    """

    out_features: int
    in_features: int
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    copies: tuple[Tensor, ...]
    off_meta: tuple[Tensor, ...] | None


class LayoutTensors(nn.Module):
    """The tensors of a :class:`~dynaprune_kernels.layout.BlockLayout`.

    None is a buffer: averages and casts of a model's buffers leave them alone. A state dict has a copy of
    ``slot_of_block``, from which loading rebuilds the others.

    Attributes:
        mask: bool ``[rows, columns]``, live blocks.
        slot_of_block: int32 ``[rows, columns]``, -1 without a slot.
        index: int32, packed as :mod:`dynaprune_kernels.index` says.
    """

    out_features: int
    in_features: int
    rows: int
    columns: int
    block: Block
    conv: ConvGeometry | None
    mask: Tensor
    slot_of_block: Tensor
    index: Tensor
    _off_meta: tuple[Tensor, ...] | None

    @property
    def blocks(self) -> int:
        """Number of blocks of the fully live weight."""
        return self.rows * self.columns

    @property
    def capacity(self) -> int:
        """Number of slots; read from the size of :attr:`index`, dynamic in a compiled model."""
        return capacity_of_index(self.index, self.rows, column_lists(self.columns, self.conv))

    @property
    def lists(self) -> IndexSections:
        """Named views into :attr:`index`."""
        return sections(self.index, self.rows, self.capacity)

    @property
    def known_slots(self) -> Tensor:
        """:attr:`slot_of_block`, on the host where the layout is on the meta device."""
        return self.slot_of_block if self._off_meta is None else self._off_meta[1]

    def restore_(self, slot_of_block: Tensor, capacity: int) -> None:
        """Adopt the slots of another layout of the same grid (a checkpoint's); blocks with a slot are live.

        Raises:
            TypeError, ValueError: not int32 of the grid's shape, slots outside the capacity or used twice.
        """
        self._check_capacity(capacity)
        if slot_of_block.dtype != torch.int32:
            raise TypeError(f"expected int32 slots, got {slot_of_block.dtype}")
        if slot_of_block.shape != self.slot_of_block.shape:
            raise ValueError(
                f"expected slots of shape {tuple(self.slot_of_block.shape)}, got {tuple(slot_of_block.shape)}"
            )
        used = slot_of_block[slot_of_block >= 0]
        outside = (slot_of_block < -1) | (slot_of_block >= capacity)
        if outside.any() or used.unique().numel() != used.numel():
            raise ValueError(
                f"expected -1, or each slot once and below the capacity {capacity}, "
                f"got {slot_of_block.flatten().tolist()[:20]}"
            )
        if self.mask.is_meta:
            self.index = self._new_index(capacity)
            self._off_meta = self._on_host(slot_of_block.cpu(), capacity)
            return
        self.slot_of_block.copy_(slot_of_block)
        self.mask.copy_(self.slot_of_block >= 0)
        self.index = self._new_index(capacity)
        self._rebuild(release=False)

    def snapshot(self) -> LayoutSnapshot:
        """What :meth:`rollback_` goes back to, whatever has changed the layout in between."""
        tensors = tuple(getattr(self, name) for name in TENSORS)
        return LayoutSnapshot(
            self.out_features,
            self.in_features,
            tensors,
            tuple(tensor._version for tensor in tensors),
            tuple(tensor.clone() for tensor in tensors),
            self._off_meta,
        )

    def rollback_(self, snapshot: LayoutSnapshot) -> None:
        """Be again what :meth:`snapshot` found: the same sizes and tensors, with the same numbers.

        A tensor that nothing wrote to since keeps its version: graphs that saved it stay valid. Writes that
        move no version (``.data``, numpy) are not taken back.
        """
        self.out_features, self.in_features = snapshot.out_features, snapshot.in_features
        for name, tensor, version, copy in zip(
            TENSORS, snapshot.tensors, snapshot.versions, snapshot.copies, strict=True
        ):
            if tensor._version != version:
                tensor.copy_(copy)
            setattr(self, name, tensor)
        self.rows, self.columns = self.mask.shape
        self._off_meta = snapshot.off_meta

    def _check_capacity(self, capacity: int) -> None:
        if not 1 <= capacity <= self.blocks:
            raise ValueError(f"expected a capacity from 1 to {self.blocks} blocks, got {capacity}")

    def _new_index(self, capacity: int, device: torch.device | None = None) -> Tensor:
        size = index_size(self.rows, column_lists(self.columns, self.conv), capacity)
        return torch.zeros(size, dtype=torch.int32, device=device or self.mask.device)

    def _rebuild(self, *, release: bool) -> None:
        torch.ops.dynaprune.layout_update(
            self.mask, self.slot_of_block, self.index, self.capacity, self.conv, release
        )

    def _on_host(self, slots: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        slots = slots.clone(memory_format=torch.contiguous_format)
        mask, index = slots >= 0, self._new_index(capacity, slots.device)
        torch.ops.dynaprune.layout_update(mask, slots, index, capacity, self.conv, False)
        return mask, slots, index

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayoutTensors:
        super()._apply(fn, recurse)
        before = tuple(getattr(self, name) for name in TENSORS)
        after = tuple(moved(tensor, fn) for tensor in before)
        for name, tensor in zip(TENSORS, after, strict=True):
            setattr(self, name, tensor)
        if self.mask.is_meta and not before[0].is_meta:
            self._off_meta = tuple(tensor.cpu() for tensor in before)
        elif before[0].is_meta and not self.mask.is_meta:
            self._leave_meta()
        return self

    def _leave_meta(self) -> None:
        if self._off_meta is not None:
            for tensor, kept in zip((self.mask, self.slot_of_block, self.index), self._off_meta, strict=True):
                tensor.copy_(kept)
            self._off_meta = None
            return
        self.mask.zero_()
        self.slot_of_block.fill_(-1)
        self.index.zero_()
        self._rebuild(release=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in set(TENSORS) & set(self._buffers):  # pickled when they were buffers
            self.__dict__[name] = self._buffers.pop(name)
            self._non_persistent_buffers_set.discard(name)
        self.__dict__.setdefault("_off_meta", None)
        self.block = Block(*self.block)  # a plain pair in older files

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write a copy of ``slot_of_block``: one per state dict, also where it has the layout twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        first, written = _IN_STATE_DICT.get(self, ("", None))
        copy = written() if written is not None else None
        if copy is None or destination.get(first) is not copy:
            copy = self.known_slots.clone()
            _IN_STATE_DICT[self] = (f"{prefix}slot_of_block", ref(copy))
        destination[f"{prefix}slot_of_block"] = copy

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        key = f"{prefix}slot_of_block"
        slots = state_dict.get(key)
        if isinstance(slots, Tensor):
            self.restore_(slots, self.capacity)
        elif strict:
            missing_keys.append(key)
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, *args)
