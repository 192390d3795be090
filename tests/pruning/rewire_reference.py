"""Drop and grow on dense tensors times masks, one block at a time: the truth for the tests."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Block = tuple[int, int]


@dataclass
class Masked:
    """A plain layer, which of its 8x8 blocks live, and what is known of each."""

    name: str
    layer: Any
    live: set[Block]
    rows: int
    columns: int
    mean: dict[Block, float] = field(default_factory=dict)
    count: dict[Block, int] = field(default_factory=dict)
    safe_until: dict[Block, int] = field(default_factory=dict)
    inputs: Tensor | None = None

    @classmethod
    def of(cls, name: str, layer: Any, live: Tensor) -> Masked:
        made = cls(name, layer, {(r, c) for r, c in live.nonzero().tolist()}, *live.shape)
        layer.register_forward_pre_hook(lambda _, given: setattr(made, "inputs", given[0].detach()))
        return made

    def cells(self, tensor: Tensor, block: Block) -> Tensor:
        """The block of a tensor shaped like the weight, as a view."""
        row, column = block
        if tensor.dim() == 2:
            return tensor[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        _, inputs, _, kernel_width = tensor.shape
        tap, channels = divmod(column, math.ceil(inputs / 8))
        part = tensor[row * 8 : row * 8 + 8, channels * 8 : channels * 8 + 8]
        return part[:, :, tap // kernel_width, tap % kernel_width]

    def energy(self, block: Block) -> float:
        """Mean square of the inputs that the block reads."""
        assert self.inputs is not None
        if self.inputs.dim() == 2:
            return float(self.inputs[:, block[1] * 8 : block[1] * 8 + 8].square().mean())
        width = self.layer.in_channels // self.layer.groups
        group = block[0] * 8 // (self.layer.out_channels // self.layer.groups)
        first = block[1] % math.ceil(width / 8) * 8
        channels = slice(group * width + first, group * width + min(first + 8, width))
        return float(self.inputs[:, channels].square().mean())

    def dead(self) -> list[Block]:
        return [(r, c) for r in range(self.rows) for c in range(self.columns) if (r, c) not in self.live]

    def observe(self) -> None:
        """Second moments of the gates of live blocks, and the gradient of dead ones away."""
        weight, grad = self.layer.weight.detach(), self.layer.weight.grad
        for block in self.live:
            gate = float((self.cells(weight, block) * self.cells(grad, block)).sum())
            mean = self.mean.get(block, 0.0)
            self.mean[block] = mean + 0.01 * (gate**2 - mean)
            self.count[block] = self.count.get(block, 0) + 1
        for block in self.dead():
            self.cells(grad, block).zero_()

    def score(self, block: Block, kind: str) -> float:
        if kind == "magnitude":
            return float(self.cells(self.layer.weight.detach(), block).square().sum())
        if not self.count.get(block):
            return math.inf
        return self.mean[block] / (1 - 0.99 ** self.count[block])


def swap(
    masked: Masked,
    probe: dict[Block, float],
    optimizer: torch.optim.Optimizer,
    step: int,
    share: float,
    interval: int,
    *,
    growth: str,
    kind: str,
    seed: int,
) -> int:
    """One event of a layer; the number of blocks that changed places."""
    order = sorted(masked.live, key=lambda b: (masked.score(b, kind), b))
    may_go = []
    for block in order:
        others = [b for b in masked.live if b[0] == block[0] and order.index(b) > order.index(block)]
        if others and masked.safe_until.get(block, 0) <= step:
            may_go.append(block)
    dead = masked.dead()
    if growth == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/rewire/{step}/{masked.name}".encode()))
        keys = torch.rand(masked.rows, masked.columns, generator=generator, dtype=torch.float64)
        wanted = sorted(dead, key=lambda b: -float(keys[b]))
    else:
        wanted = sorted((b for b in dead if probe[b] > 0), key=lambda b: -probe[b])
    count = min(math.floor(share * len(masked.live) + 1e-9), len(may_go), len(wanted))
    weight = masked.layer.weight
    for block in [*may_go[:count], *wanted[:count]]:
        masked.mean.pop(block, None)
        masked.count.pop(block, None)
        for tensor in (weight.detach(), *(t for t in optimizer.state[weight].values() if t is not None)):
            masked.cells(tensor, block).zero_()
    masked.live -= set(may_go[:count])
    masked.live |= set(wanted[:count])
    masked.safe_until.update(dict.fromkeys(wanted[:count], step + interval + 1))
    return count


def probed(masked: Masked) -> dict[Block, float]:
    """Of every dead block the squared norm of the dense gradient over the mean square of its inputs."""
    grad = masked.layer.weight.grad
    found = {}
    for block in masked.dead():
        energy = masked.energy(block)
        found[block] = float(masked.cells(grad, block).square().sum()) / energy if energy else 0.0
    return found
