"""``BlockLayout``: the live mask of one block-sparse weight, its slots and the kernels' index lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from dynaprune_kernels.geometry import ConvGeometry, check_block, check_int32, conv_grid, linear_grid
from dynaprune_kernels.index import (
    FAULTS,
    N_LIVE,
    OVERFLOW,
    IndexSections,
    capacity_of_index,
    column_lists,
    index_size,
    sections,
)
from dynaprune_kernels.placement import moved

LADDER_RATIO = 0.75
_TENSORS = ("mask", "slot_of_block", "index")
_IN_STATE_DICT: WeakKeyDictionary[nn.Module, tuple[str, ref[Tensor]]] = WeakKeyDictionary()


class BlockLayout(nn.Module):
    """Which blocks of a weight live, where their values are stored, and every index list that kernels need.

    A block is *live* (has a slot and is listed), *suspended* (keeps its slot and values, is not listed) or
    has no slot. ``values [capacity, bi, bo]`` of the layer that owns the layout is addressed by slot.

    Attributes:
        mask: bool ``[rows, columns]``, live blocks.
        slot_of_block: int32 ``[rows, columns]``, -1 without a slot; the only persistent buffer.
        index: int32, packed as :mod:`dynaprune_kernels.index` says.
    """

    mask: Tensor
    slot_of_block: Tensor
    index: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        block: int | tuple[int, int],
        *,
        conv: ConvGeometry | None = None,
        mask: Tensor | None = None,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Lay out a weight of ``out_features`` x ``in_features`` (channels, for a convolution).

        Args:
            block: ``(bo, bi)``: outputs and inputs per block.
            mask: live blocks, all by default.
            capacity: slots, one per live block by default.

        Raises:
            TypeError, ValueError: sizes or mask of the wrong kind.
        """
        super().__init__()
        block = check_block(block)
        if out_features < 1 or in_features < 1:
            raise ValueError(
                f"expected at least one output and one input, got {out_features} and {in_features}"
            )
        self.out_features, self.in_features, self.block, self.conv = out_features, in_features, block, conv
        if conv is None:
            self.rows, self.columns = linear_grid(out_features, in_features, block)
        else:
            self.rows, self.columns = conv_grid(out_features, in_features, block, conv)
        check_int32(self.rows, self.columns)
        if mask is None:
            mask = torch.ones(self.rows, self.columns, dtype=torch.bool, device=device)
        mask = self._checked(mask.to(device) if isinstance(mask, Tensor) else mask)
        mask = mask.clone(memory_format=torch.contiguous_format)
        if capacity is None:
            capacity = max(int(mask.sum()), 1)
        self._check_capacity(capacity)
        self.mask = mask
        self.slot_of_block = torch.full_like(mask, -1, dtype=torch.int32)
        self.index = self._new_index(capacity)
        self._off_meta: tuple[Tensor, ...] | None = None
        self._rebuild(release=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockLayout:
        super()._apply(fn, recurse)
        before = tuple(getattr(self, name) for name in _TENSORS)
        after = tuple(moved(tensor, fn) for tensor in before)
        for name, tensor in zip(_TENSORS, after, strict=True):
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
        for name in set(_TENSORS) & set(self._buffers):  # pickled when they were buffers
            self.__dict__[name] = self._buffers.pop(name)
            self._non_persistent_buffers_set.discard(name)
        self.__dict__.setdefault("_off_meta", None)

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

    def _new_index(self, capacity: int) -> Tensor:
        size = index_size(self.rows, column_lists(self.columns, self.conv), capacity)
        return torch.zeros(size, dtype=torch.int32, device=self.mask.device)

    def _check_capacity(self, capacity: int) -> None:
        if not 1 <= capacity <= self.blocks:
            raise ValueError(f"expected a capacity from 1 to {self.blocks} blocks, got {capacity}")

    def _checked(self, mask: Tensor) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"expected a bool mask, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != (self.rows, self.columns):
            raise ValueError(f"expected a mask of shape {(self.rows, self.columns)}, got {tuple(mask.shape)}")
        return mask

    def _rebuild(self, *, release: bool) -> None:
        torch.ops.dynaprune.layout_update(
            self.mask, self.slot_of_block, self.index, self.capacity, self.conv, release
        )

    @property
    def capacity(self) -> int:
        """Number of slots; read from the size of :attr:`index`, dynamic in a compiled model."""
        lists = column_lists(self.columns, self.conv)
        return capacity_of_index(self.index, self.rows, lists)

    @property
    def blocks(self) -> int:
        """Number of blocks of the fully live weight."""
        return self.rows * self.columns

    @property
    def lists(self) -> IndexSections:
        """Named views into :attr:`index`."""
        return sections(self.index, self.rows, self.capacity)

    def update_(self, mask: Tensor, *, release: bool = True) -> None:
        """Make ``mask`` the live mask, on the device: no host sync, no allocation of index buffers.

        Blocks that die give their slot back with ``release`` and are suspended without. Blocks that come
        alive keep or get a slot, in row-major order, the lowest free one first; what finds none stays dead
        and is counted (see
        :meth:`check`). Values in a new slot are the caller's to initialise.

        Args:
            mask: bool ``[rows, columns]`` on the layout's device.

        Raises:
            TypeError, ValueError: dtype, shape or device of the mask.
        """
        mask = self._checked(mask)
        if mask.device != self.mask.device:
            raise ValueError(f"expected a mask on {self.mask.device}, got {mask.device}")
        self.mask.copy_(mask)
        self._rebuild(release=release)

    def suspend_(self, blocks: Tensor) -> None:
        """Take ``blocks`` (bool ``[rows, columns]``) out of every index list; slots and values stay."""
        self.update_(self.mask & ~self._checked(blocks), release=False)

    def resume_(self) -> None:
        """List every suspended block again."""
        self.update_(self.slot_of_block >= 0, release=False)

    def release_(self, blocks: Tensor) -> None:
        """Let ``blocks`` die: out of the lists, their slots free."""
        self.update_(self.mask & ~self._checked(blocks))

    def allocate_(self, blocks: Tensor) -> None:
        """Let ``blocks`` live: each gets a free slot; initialise its values afterwards."""
        self.update_(self.mask | self._checked(blocks))

    def live_count(self) -> int:
        """Number of live blocks; syncs with the device."""
        return int(self.index[N_LIVE].item())

    def density(self) -> float:
        """Live blocks over all blocks; syncs with the device."""
        return self.live_count() / self.blocks

    def check(self) -> None:
        """Compare the index with what an update writes for the same mask and slots; syncs.

        Kernels on a GPU take what they cannot use in an index for absent and raise nothing: this does.

        Raises:
            RuntimeError: the last update wanted more live blocks than there is capacity; something other than
                an update wrote to index, mask or ``slot_of_block``.
        """
        mask, slots, index = (getattr(self, name).clone() for name in _TENSORS)
        torch.ops.dynaprune.layout_update(mask, slots, index, self.capacity, self.conv, False)
        wrong = [int(index[FAULTS].item()), int(self.index[FAULTS].item())]
        dropped = int(self.index[OVERFLOW].item())
        index[OVERFLOW] = dropped
        now = zip((mask, slots, index), _TENSORS, strict=True)
        if any(wrong) or not all(torch.equal(rebuilt, getattr(self, name)) for rebuilt, name in now):
            raise RuntimeError(
                f"the layout is corrupted: its index is not that of its mask and slots (capacity "
                f"{self.capacity}); something other than an update wrote to one of them"
            )
        if dropped:
            raise RuntimeError(
                f"{dropped} blocks found no free slot (capacity {self.capacity}) and stayed dead: "
                f"compact to a larger capacity before more blocks come alive"
            )

    def ladder_capacity(self, least: int) -> int:
        """Smallest capacity of the ladder ``blocks * 0.75^k`` that holds ``least`` slots."""
        capacity = self.blocks
        while (smaller := int(capacity * LADDER_RATIO)) >= max(least, 1):
            capacity = smaller
        return capacity

    def compact_(self, capacity: int) -> Tensor:
        """Change the number of slots; live and suspended blocks move together in front, in order of their
        slots.

        Returns:
            int64 ``[capacity]``: for every new slot the old slot to copy from, -1 for a free one. The caller
            gathers ``values``, gradient and optimizer state with it. Syncs with the device.

        Raises:
            ValueError: a capacity outside 1..blocks, or below the number of slots in use.
        """
        self._check_capacity(capacity)
        used = torch.nonzero(self.lists.block_of_slot >= 0).squeeze(1)
        if used.numel() > capacity:
            raise ValueError(
                f"expected a capacity of at least the {used.numel()} slots in use, got {capacity}"
            )
        old_slot = torch.full((capacity,), -1, dtype=torch.int64, device=used.device)
        old_slot[: used.numel()] = used
        block = self.lists.block_of_slot[used].long()
        self.slot_of_block.view(-1)[block] = torch.arange(used.numel(), dtype=torch.int32, device=used.device)
        self.index = self._new_index(capacity)
        self._rebuild(release=False)
        return old_slot

    def drop_(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Shrink the weight: whole block rows (outputs) and block columns (inputs, every tap of them) leave.

        What stays keeps its order, so a ragged last block stays last. The capacity shrinks to the blocks
        that are left where it would exceed them.

        Args:
            rows: bool ``[rows]``, true where a block row goes.
            columns: bool ``[columns / taps]``, true where a block of input channels goes.

        Returns:
            As :meth:`compact_`: for every new slot the old slot to copy from, -1 for a free one. Syncs.

        Raises:
            TypeError, ValueError: dtype or shape of the arguments, nothing left, a convolution with groups.
        """
        taps = 1 if self.conv is None else self.conv.taps
        for name, drop, size in (("rows", rows, self.rows), ("columns", columns, self.columns // taps)):
            if not isinstance(drop, Tensor) or drop.dtype != torch.bool:
                raise TypeError(f"expected bool {name}, got {getattr(drop, 'dtype', type(drop).__name__)}")
            if drop.shape != (size,):
                raise ValueError(f"expected {name} of shape {(size,)}, got {tuple(drop.shape)}")
            if bool(drop.all()):
                raise ValueError(f"expected at least one of {size} block {name} to stay, got none")
        if self.conv is not None and self.conv.groups > 1:
            raise ValueError(f"expected a convolution without groups, got groups={self.conv.groups}")
        before = self.capacity
        keep_rows, keep_columns = ~rows.to(self.mask.device), ~columns.to(self.mask.device)
        self.out_features = _kept_size(keep_rows, self.block[0], self.out_features)
        self.in_features = _kept_size(keep_columns, self.block[1], self.in_features)
        keep_columns = keep_columns.repeat(taps)
        self.mask = self.mask[keep_rows][:, keep_columns].contiguous()
        old = self.slot_of_block[keep_rows][:, keep_columns].contiguous()
        self.rows, self.columns = old.shape
        used = old[old >= 0].sort().values.long()
        capacity = min(before, self.blocks)
        old_slot = torch.full((capacity,), -1, dtype=torch.int64, device=old.device)
        old_slot[: used.numel()] = used
        self.slot_of_block = torch.where(old >= 0, torch.searchsorted(used, old.long()).int(), -1)
        self.index = self._new_index(capacity)
        self._rebuild(release=False)
        return old_slot

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

    @property
    def known_slots(self) -> Tensor:
        """:attr:`slot_of_block`, on the host where the layout is on the meta device."""
        return self.slot_of_block if self._off_meta is None else self._off_meta[1]

    def _on_host(self, slots: Tensor, capacity: int) -> tuple[Tensor, ...]:
        other = BlockLayout(
            self.out_features,
            self.in_features,
            self.block,
            conv=self.conv,
            mask=slots >= 0,
            capacity=capacity,
            device="cpu",
        )
        other.restore_(slots, capacity)
        return other.mask, other.slot_of_block, other.index

    def extra_repr(self) -> str:
        kind = "" if self.conv is None else f", kernel={self.conv[0:2]}"
        return (
            f"{self.rows}x{self.columns} blocks of {self.block[0]}x{self.block[1]}{kind}, "
            f"capacity={self.capacity}, density={self.density():.3f}"
        )


def _kept_size(keep: Tensor, block: int, size: int) -> int:
    """Elements in the kept blocks of an axis of ``size`` elements, whose last block may be ragged."""
    missing = keep.numel() * block - size
    return int(keep.sum()) * block - (missing if bool(keep[-1]) else 0)
