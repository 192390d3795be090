"""``BlockLayout``: the live mask of one block-sparse weight, its slots and the kernels' index lists."""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels.geometry import (
    ConvGeometry,
    check_block,
    check_int32,
    conv_grid,
    kept_size,
    linear_grid,
)
from dynaprune_kernels.index import FAULTS, N_LIVE, OVERFLOW
from dynaprune_kernels.layout_tensors import TENSORS, LayoutTensors

LADDER_RATIO = 0.75


class BlockLayout(LayoutTensors):
    """Which blocks of a weight live, where their values are stored, and every index list that kernels need.

    A block is *live* (has a slot and is listed), *suspended* (keeps its slot and values, is not listed) or
    has no slot. ``values [capacity, bi, bo]`` of the layer that owns the layout is addressed by slot.
    """

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
            block: outputs and inputs per block, or one number for both.
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

    @property
    def taps(self) -> int:
        """Kernel positions of a convolution, 1 of a linear weight."""
        return 1 if self.conv is None else self.conv.taps

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 of a linear weight."""
        return 1 if self.conv is None else self.conv.groups

    @property
    def dense_shape(self) -> torch.Size:
        """``[out, in]``, or ``[out, in / groups, kh, kw]`` of a convolution."""
        inputs = self.in_features // self.groups
        return torch.Size((self.out_features, inputs, *(() if self.conv is None else self.conv[0:2])))

    @property
    def block_of_slot(self) -> Tensor:
        """int32 ``[capacity]``: ``row * columns + column`` of the block, -1 in a free slot; a view."""
        return self.lists.block_of_slot

    def slots_of(self, blocks: Tensor) -> Tensor:
        """The slots of ``blocks`` (bool ``[rows, columns]``): bool ``[capacity]``.

        Those of :attr:`mask` are the slots that kernels read: neither free nor suspended.
        """
        return self.by_slot(self._checked(blocks).reshape(-1))

    def by_slot(self, blocks: Tensor) -> Tensor:
        """Gather ``[rows * columns, ...]``, in block order, into ``[capacity, ...]``; zeros in free slots."""
        block = self.block_of_slot.long()
        free = (block < 0).view(-1, *[1] * (blocks.dim() - 1))
        return blocks[block.clamp(min=0)].masked_fill_(free, 0)

    def _checked(self, mask: Tensor) -> Tensor:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"expected a bool mask, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != (self.rows, self.columns):
            raise ValueError(f"expected a mask of shape {(self.rows, self.columns)}, got {tuple(mask.shape)}")
        return mask

    def update_(self, mask: Tensor, *, release: bool = True) -> None:
        """Make ``mask`` the live mask, on the device: no host sync, no allocation of index buffers.

        Blocks that die give their slot back with ``release`` and are suspended without. Blocks that come
        alive keep or get a slot, in row-major order, the lowest free one first; what finds none stays dead
        and is counted (see :meth:`check`). Values in a new slot are the caller's to initialise.

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
        mask, slots, index = (getattr(self, name).clone() for name in TENSORS)
        torch.ops.dynaprune.layout_update(mask, slots, index, self.capacity, self.conv, False)
        wrong = [int(index[FAULTS].item()), int(self.index[FAULTS].item())]
        dropped = int(self.index[OVERFLOW].item())
        index[OVERFLOW] = dropped
        now = zip((mask, slots, index), TENSORS, strict=True)
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
        used = torch.nonzero(self.block_of_slot >= 0).squeeze(1)
        if used.numel() > capacity:
            raise ValueError(
                f"expected a capacity of at least the {used.numel()} slots in use, got {capacity}"
            )
        old_slot = torch.full((capacity,), -1, dtype=torch.int64, device=used.device)
        old_slot[: used.numel()] = used
        block = self.block_of_slot[used].long()
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
        for name, drop, size in (("rows", rows, self.rows), ("columns", columns, self.columns // self.taps)):
            if not isinstance(drop, Tensor) or drop.dtype != torch.bool:
                raise TypeError(f"expected bool {name}, got {getattr(drop, 'dtype', type(drop).__name__)}")
            if drop.shape != (size,):
                raise ValueError(f"expected {name} of shape {(size,)}, got {tuple(drop.shape)}")
            if bool(drop.all()):
                raise ValueError(f"expected at least one of {size} block {name} to stay, got none")
        if self.groups > 1:
            raise ValueError(f"expected a convolution without groups, got groups={self.groups}")
        before = self.capacity
        keep_rows, keep_columns = ~rows.to(self.mask.device), ~columns.to(self.mask.device)
        self.out_features = kept_size(keep_rows, self.block.outputs, self.out_features)
        self.in_features = kept_size(keep_columns, self.block.inputs, self.in_features)
        keep_columns = keep_columns.repeat(self.taps)
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

    def extra_repr(self) -> str:
        kind = "" if self.conv is None else f", kernel={self.conv[0:2]}"
        return (
            f"{self.rows}x{self.columns} blocks of {self.block.outputs}x{self.block.inputs}{kind}, "
            f"capacity={self.capacity}, density={self.density():.3f}"
        )
