"""``input_mean_square``: how large the inputs of each block are, beside the norm of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaprune_kernels.geometry import ceil_div
from dynaprune_kernels.ops.registration import (
    OPS,
    accumulator,
    define,
    fake,
    implement,
    no_autograd,
    weight_blocks,
)

define("input_mean_square(Tensor x, SymInt outputs, int[] block, int[]? conv, Tensor probe) -> Tensor")


@implement("input_mean_square")
def _mean_square(x: Tensor, outputs: int, block: list[int], conv: list[int] | None, probe: Tensor) -> Tensor:
    """Mean square of the inputs that each block reads, ``[rows * columns]``; zeros while ``probe`` is false.

    One pass over ``x [tokens, in]`` or ``[N, C, H, W]``; the same in plain torch on every device. Every tap
    of a convolution counts the whole image, without its zero padding.
    """
    dtype, blocks = accumulator(x.dtype), _blocks(x, outputs, block, conv)
    if probe.device.type == "cpu" and not probe:
        return x.new_zeros(blocks, dtype=dtype)
    groups, taps = (1, 1) if conv is None else (conv[8], conv[0] * conv[1])
    width, bi = x.shape[1] // groups, block[1]
    over = [dim for dim in range(x.dim()) if dim != 1]
    square = torch.linalg.vector_norm(x, dim=over, dtype=dtype).square()
    by_block = F.pad(square.view(groups, width), (0, -width % bi)).view(groups, -1, bi).sum(2)
    sizes = F.pad(x.new_ones(width, dtype=dtype), (0, -width % bi)).view(-1, bi).sum(1)
    mean = by_block / sizes / max(x.numel() // x.shape[1], 1)
    rows = ceil_div(outputs, block[0]) // groups
    mean = mean.repeat(1, taps).repeat_interleave(rows, 0).reshape(-1)
    return mean.masked_fill(~probe, 0)


def _blocks(x: Tensor, outputs: int, block: list[int], conv: list[int] | None) -> int:
    groups, taps = (1, 1) if conv is None else (conv[8], conv[0] * conv[1])
    return weight_blocks(outputs, x.shape[1] // groups, block, taps)


@fake("input_mean_square")
def _(x, outputs, block, conv, probe):  # type: ignore[no-untyped-def]
    return x.new_empty(_blocks(x, outputs, block, conv), dtype=accumulator(x.dtype))


no_autograd("input_mean_square")


def input_rows(
    tap_rows: int, x: Tensor, outputs: int, block: Sequence[int], conv: Any, probe: Tensor | None
) -> tuple[Tensor, ...]:
    """What a tap's gradient has behind its second row: for a third one the inputs' mean squares."""
    if tap_rows < 3:
        return ()
    probe = x.new_zeros((), dtype=torch.bool) if probe is None else probe
    return (OPS.input_mean_square(x, outputs, block, conv, probe),)
