"""Blocks cut out of a dense weight: each beside a slice of it, ragged edges and convolutions too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynaprune_kernels import ConvGeometry
from dynaprune_kernels.reference import chosen_blocks, dense_to_blocks


@pytest.mark.parametrize("shape", [(32, 48), (27, 45), (5, 3)])
@pytest.mark.parametrize("taps", [None, (3, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks_are_slices(shape: tuple[int, int], taps: tuple[int, int] | None, channels_last: bool) -> None:
    bo, bi = block = 8, 16
    (out, inputs), (height, width) = shape, taps or (1, 1)
    conv = None if taps is None else ConvGeometry(height, width)
    weight = torch.randn(out, inputs, height, width, generator=torch.Generator().manual_seed(0))
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    whole = F.pad(weight, (0, 0, 0, 0, 0, -inputs % bi, 0, -out % bo))
    given = weight[:, :, 0, 0] if taps is None else weight
    cut = dense_to_blocks(given, block, conv)
    expected = [
        whole[row : row + bo, column : column + bi, tap // width, tap % width].t()
        for row in range(0, whole.shape[0], bo)
        for tap in range(height * width)
        for column in range(0, whole.shape[1], bi)
    ]
    assert torch.equal(cut, torch.stack(expected)) and cut.is_contiguous()
    numbers = torch.randperm(len(expected))[: 1 + len(expected) // 2]
    found = chosen_blocks(given, block, conv, numbers)
    assert torch.equal(found, cut[numbers]) and found.is_contiguous()
    found.zero_()
    assert torch.equal(dense_to_blocks(given, block, conv), cut), "the weight is as it was"
    assert chosen_blocks(given, block, conv, numbers[:0]).shape == (0, bi, bo)
