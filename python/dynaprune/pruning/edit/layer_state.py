"""Everything that a pruner knows of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynaprune.neurons.cut_plan import Kept
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import block_weights


@dataclass(eq=False)
class LayerState:
    """A layer that is pruned.

    Attributes:
        name: of the layer in the model.
        layer: the layer itself.
        original: shape of the dense weight at attach.
        blocks: of the whole weight at attach, live or not.
        left_out: blocks of these that training began without.
        rate: by how much its values learn faster than all else.
        live_weights: weights of live blocks, as last measured.
        ever_lived: blocks of these that live or have lived.
        never_lived: bool ``[rows, columns]``, those that have not; None: none is left.
        observations: steps whose gradients the score has seen.
        statistics: what the score keeps. Names that begin with "block" hold ``[rows, columns]``, those that
            begin with "neuron" ``[out]``. Both are sliced with the layer; a block that dies loses its own.
        probe: squared norms of the dense gradient at dead blocks, ``[rows, columns]``, over the mean squares
            of their inputs where the layer's tap has these; None but at an event.
        protected_until: int64 ``[rows, columns]``, first step at which a block may be removed; None: any.
        waiting: int64 ``[rows, columns]``, of a block that has not lived yet its number in the trained weight
            that its values are in, else -1; None where no values wait.
    """

    name: str
    layer: BlockSparseLayer
    original: tuple[int, ...]
    blocks: int
    left_out: int = 0
    rate: float = 1.0
    live_weights: int = 0
    ever_lived: int = 0
    never_lived: Tensor | None = None
    observations: int = 0
    statistics: dict[str, Tensor] = field(default_factory=dict)
    probe: Tensor | None = None
    protected_until: Tensor | None = None
    waiting: Tensor | None = None

    @classmethod
    def of(cls, name: str, layer: BlockSparseLayer, left_out: int = 0, rate: float = 1.0) -> LayerState:
        """The state of a layer that nothing is known of yet."""
        layout = layer.layout
        live = layout.live_count()
        never = None if live == layout.blocks else ~layout.mask
        return cls(
            name,
            layer,
            tuple(layout.dense_shape),
            layout.blocks,
            left_out,
            rate,
            ever_lived=live,
            never_lived=never,
        )

    @property
    def weights(self) -> int:
        """Weights of the dense weight at attach."""
        return math.prod(self.original)

    @property
    def density(self) -> float:
        """Share of the original weights that live, as last measured."""
        return self.live_weights / self.weights

    @property
    def mask(self) -> Tensor:
        """Bool ``[rows, columns]``: the live blocks."""
        return self.layer.layout.mask

    def measure(self) -> None:
        """Bring :attr:`live_weights` up to date. Syncs."""
        self.live_weights = int((block_weights(self.layer) * self.mask).sum().item())

    def protected(self, step: int) -> Tensor:
        """Bool ``[rows, columns]``: blocks that may not go at ``step``; all before a gradient was seen."""
        if not self.observations:
            return self.mask.clone()
        if self.protected_until is None:
            return torch.zeros_like(self.mask)
        return self.protected_until > step

    def protect(self, blocks: Tensor, until: int) -> None:
        """Let no event before step ``until`` remove ``blocks`` (bool ``[rows, columns]``)."""
        previous = self.protected_until
        if previous is None or previous.shape != blocks.shape:
            previous = torch.zeros(blocks.shape, dtype=torch.int64, device=blocks.device)
        self.protected_until = torch.where(blocks, until, previous.to(blocks.device))

    def note_born(self, blocks: Tensor) -> None:
        """Count those of ``blocks`` (bool ``[rows, columns]``) that live for the first time. Syncs."""
        if self.never_lived is not None:
            self.ever_lived += int((self.never_lived & blocks).sum())
            self.never_lived &= ~blocks

    def forget(self, blocks: Tensor) -> None:
        """Start the score's statistics of ``blocks`` (bool ``[rows, columns]``) afresh."""
        for key, tensor in self.statistics.items():
            if key.startswith("block"):
                tensor.masked_fill_(blocks.to(tensor.device), 0)

    def keep(self, kept: Kept) -> None:
        """Slice what is known after neurons were cut: what stays, in its new order."""
        for key, tensor in self.statistics.items():
            if key.startswith("block"):
                tensor = tensor[kept.rows.to(tensor.device)][:, kept.columns.to(tensor.device)]
            elif key.startswith("neuron"):
                tensor = tensor[kept.neurons.to(tensor.device)]
            self.statistics[key] = tensor
        for key in ("protected_until", "never_lived", "waiting"):
            if (by_block := getattr(self, key)) is not None:
                rows, columns = kept.rows.to(by_block.device), kept.columns.to(by_block.device)
                setattr(self, key, by_block[rows][:, columns])

    def wait(self) -> None:
        """Let the blocks that are dead now wait for their values."""
        numbers = torch.arange(self.mask.numel(), device=self.mask.device).view(self.mask.shape)
        self.waiting = torch.where(self.mask, -1, numbers)
