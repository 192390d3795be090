"""The reference where a tap meets nothing but padding: oneDNN reads outside its memory, or dies of it."""

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
    ConvGeometry(1, 1, 2, 3, 2, 2, 1, 2, 3),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("conv", GEOMETRIES, ids=lambda conv: ".".join(map(str, conv)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_forward_pass(
    conv: ConvGeometry, channels_last: bool, dtype: torch.dtype, poisoned_memory: None
) -> None:
    for (height, width), repeat in itertools.product([(4, 3), (2, 2), (3, 1), (4, 1)], range(4)):
        generator = torch.Generator().manual_seed(repeat)
        layout = BlockLayout(32 * conv.groups, 23 * conv.groups, (32, 24), conv=conv)
        values = torch.randn(layout.capacity, 24, 32, generator=generator).to(dtype)
        try:
            conv.output_size(height, width)
        except ValueError:
            continue
        x = torch.randn(2, layout.in_features, height, width, generator=generator).to(dtype)
        y = reference.conv2d_forward(x, values, None, layout.index, layout.out_features, conv, channels_last)
        weight = reference.dense_weight(values.double(), layout.index, layout.out_features, 23, conv)
        options = (None, conv[2:4], conv[4:6], conv[6:8], conv.groups)
        truth = F.conv2d(x.double(), weight, *options)
        size = F.conv2d(x.double().abs(), weight.abs(), *options)
        assert bool(((y.double() - truth).abs() <= 4 * torch.finfo(dtype).eps * size).all())


def test_a_layer_that_ended_the_process() -> None:
    conv = ConvGeometry(1, 1, 2, 3, 2, 2, 1, 2, 3)
    layout = BlockLayout(27, 66, (9, 16), conv=conv)
    values, x, bias = torch.randn(layout.capacity, 16, 9), torch.randn(5, 66, 4, 1), torch.randn(27)
    y = reference.conv2d_forward(x, values, bias, layout.index, 27, conv, channels_last=True)
    weight = reference.dense_weight(values, layout.index, 27, 22, conv)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), conv[2:4], conv[4:6], conv[6:8], 3)
    assert bool(((y - truth).abs() <= 1e-5 * (1 + truth.abs().max())).all())
