"""The reference where a tap meets nothing but padding: oneDNN reads outside its memory, or dies of it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
def test_forward_and_gradients(
    conv: ConvGeometry, channels_last: bool, dtype: torch.dtype, poisoned_memory: None
) -> None:
    for (height, width), repeat in itertools.product([(4, 3), (2, 2), (3, 1), (4, 1)], range(2)):
        generator = torch.Generator().manual_seed(repeat)
        layout = BlockLayout(32 * conv.groups, 23 * conv.groups, (32, 24), conv=conv)
        try:
            size = conv.output_size(height, width)
        except ValueError:
            continue
        images = (2, layout.in_features, height, width), (2, layout.out_features, *size)
        shapes = (layout.capacity, 24, 32), *images
        values, x, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
        if channels_last:
            x, dy = (image.contiguous(memory_format=torch.channels_last) for image in (x, dy))
        bias = torch.randn(layout.out_features, generator=generator).to(dtype)
        index, outputs = layout.index, layout.out_features
        found = (
            reference.conv2d_forward(x, values, bias, index, outputs, conv, channels_last),
            reference.conv2d_dgrad(dy, values, index, list(x.shape), conv, channels_last),
            reference.conv2d_wgrad(dy, x, index, layout.capacity, layout.block, conv),
        )
        truth, sizes = (
            _in_float64(layout, *(of(tensor.double()) for tensor in (x, values, bias, dy)), conv)
            for of in (torch.clone, torch.abs)
        )
        for got, exact, scale in zip(found, truth, sizes, strict=True):
            assert bool(((got.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * scale).all())


def _in_float64(
    layout: BlockLayout, x: Tensor, values: Tensor, bias: Tensor, dy: Tensor, conv: ConvGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of input and values, by autograd and without oneDNN."""
    weight = reference.dense_weight(values, layout.index, layout.out_features, 23, conv)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = F.conv2d(x, weight, bias, conv[2:4], conv[4:6], conv[6:8], conv.groups)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    blocks = reference.dense_to_blocks(dw, layout.block, conv)
    return y.detach(), dx, blocks[layout.block_of_slot.long()]


def test_a_layer_that_ended_the_process() -> None:
    conv = ConvGeometry(1, 1, 2, 3, 2, 2, 1, 2, 3)
    layout = BlockLayout(27, 66, (9, 16), conv=conv)
    values, x, bias = torch.randn(layout.capacity, 16, 9), torch.randn(5, 66, 4, 1), torch.randn(27)
    y = reference.conv2d_forward(x, values, bias, layout.index, 27, conv, channels_last=True)
    weight = reference.dense_weight(values, layout.index, 27, 22, conv)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), conv[2:4], conv[4:6], conv[6:8], 3)
    assert bool(((y - truth).abs() <= 1e-5 * (1 + truth.abs().max())).all())
