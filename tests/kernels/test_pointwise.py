"""A pointwise convolution over pixels: where it runs as a linear layer, and that it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry, reference
from dynaprune_kernels.backends import cpu, cuda, triton
from dynaprune_kernels.backends.pointwise import OverPixels, convolutions

POINTWISE = ConvGeometry(1, 1)


def test_a_gpu_s_backends_run_it_over_pixels_and_the_others_as_a_convolution() -> None:
    for backend in (cuda, triton):
        over_pixels = convolutions(backend, POINTWISE)
        assert isinstance(over_pixels, OverPixels) and over_pixels.backend is backend
        for conv in (ConvGeometry(3, 1), ConvGeometry(1, 1, 2, 1), ConvGeometry(1, 1, groups=2)):
            assert convolutions(backend, conv) is backend
    for backend in (cpu, reference):
        assert convolutions(backend, POINTWISE) is backend


@pytest.mark.parametrize("channels_last", [True, False])
def test_over_pixels_computes_what_the_convolution_does(channels_last: bool) -> None:
    mask = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    layout = BlockLayout(40, 20, (16, 8), conv=POINTWISE, mask=mask)
    shape = (layout.capacity, layout.block.inputs, layout.block.outputs)
    values, bias = torch.randn(shape, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    x, dy = (torch.randn(2, channels, 3, 5, dtype=torch.float64) for channels in (20, 40))
    conv, index, on = POINTWISE, layout.index, torch.tensor(True)
    pixels = OverPixels(reference)

    def results(backend: OverPixels) -> list[Tensor]:
        y = backend.conv2d_forward(x, values, bias, index, 40, conv, channels_last)
        dx = backend.conv2d_dgrad(dy, values, index, list(x.shape), conv, channels_last)
        for image in (y, dx):
            assert image.is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )
        dw = backend.conv2d_wgrad(dy, x, index, layout.capacity, layout.block, conv)
        probed = backend.conv2d_probe(dy, x, index, layout.capacity, layout.block, conv, on)
        return [y, dx, dw, *backend.conv2d_wgrad_saliency(dy, x, values, index, conv), probed]

    for found, expected in zip(results(pixels), results(reference), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
