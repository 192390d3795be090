"""The reference in bfloat16 where a tap meets nothing but padding, which oneDNN's convolution gets wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from dynaprune_kernels import BlockLayout, ConvGeometry, reference

GEOMETRIES = [
    ConvGeometry(2, 3, 1, 3, 1, 1, 1, 2, 3),
    ConvGeometry(1, 3, 1, 1, 0, 2, 1, 2),
    ConvGeometry(3, 1, 2, 1, 2, 0, 2, 1),
    ConvGeometry(3, 3, 2, 2, 1, 1),
]


@pytest.mark.parametrize("conv", GEOMETRIES, ids=lambda conv: ".".join(map(str, conv)))
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_reference_in_bfloat16(conv: ConvGeometry, channels_last: bool, poisoned_memory: None) -> None:
    for (height, width), repeat in itertools.product([(4, 3), (2, 2), (3, 1)], range(4)):
        generator = torch.Generator().manual_seed(repeat)
        layout = BlockLayout(32 * conv.groups, 23 * conv.groups, (32, 24), conv=conv)
        values = torch.randn(layout.capacity, 24, 32, generator=generator).bfloat16()
        try:
            conv.output_size(height, width)
        except ValueError:
            continue
        x = torch.randn(2, layout.in_features, height, width, generator=generator).bfloat16()
        y = reference.conv2d_forward(x, values, None, layout.index, layout.out_features, conv, channels_last)
        weight = reference.dense_weight(values.double(), layout.index, layout.out_features, 23, conv)
        options = (None, conv[2:4], conv[4:6], conv[6:8], conv.groups)
        truth = F.conv2d(x.double(), weight, *options)
        size = F.conv2d(x.double().abs(), weight.abs(), *options)
        assert bool(((y.double() - truth).abs() <= 4 * torch.finfo(torch.bfloat16).eps * size).all())
