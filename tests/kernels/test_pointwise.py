"""A pointwise convolution over pixels: where it runs as a linear layer, and that it computes the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dynaprune_kernels import BlockLayout, ConvGeometry, reference
from dynaprune_kernels.backends import cpu, cuda, triton
from dynaprune_kernels.backends.pointwise import OverPixels, convolutions

POINTWISE = ConvGeometry(1, 1)


CONTIGUOUS = torch.zeros(2, 3, 4, 5)
CHANNELS_LAST = CONTIGUOUS.contiguous(memory_format=torch.channels_last)
BOTH = torch.zeros(2, 3, 1, 1)


def test_a_gpu_s_backends_run_it_over_pixels_and_the_vendor_s_library_as_a_convolution() -> None:
    for backend in (cuda, triton):
        for image, channels_last in itertools.product((CONTIGUOUS, CHANNELS_LAST, BOTH), (True, False)):
            over_pixels = convolutions(backend, POINTWISE, image, channels_last=channels_last)
            assert isinstance(over_pixels, OverPixels) and over_pixels.backend is backend
    assert convolutions(reference, POINTWISE, CHANNELS_LAST) is reference


def test_the_cpu_runs_it_over_pixels_in_channels_last_memory() -> None:
    for image in (CHANNELS_LAST, BOTH, CONTIGUOUS[:, :, ::2]):
        over_pixels = convolutions(cpu, POINTWISE, CHANNELS_LAST, image)
        assert isinstance(over_pixels, OverPixels) and over_pixels.backend is cpu
        assert convolutions(cpu, POINTWISE, image, channels_last=False) is cpu
    assert convolutions(cpu, POINTWISE, CHANNELS_LAST, CONTIGUOUS) is cpu


@pytest.mark.parametrize(
    "conv", [ConvGeometry(3, 1), ConvGeometry(1, 1, 2, 1), ConvGeometry(1, 1, groups=2)], ids=str
)
def test_no_other_convolution_runs_over_pixels(conv: ConvGeometry) -> None:
    for backend in (cpu, cuda, triton, reference):
        assert convolutions(backend, conv, CHANNELS_LAST) is backend


Backend = ModuleType | OverPixels


def _results(channels_last: bool) -> Callable[[Backend], list[Tensor]]:
    """All five products of one problem; outputs 40 of which the last block holds 8, inputs 20 of which 4."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 3, generator=generator) < 0.6
    layout = BlockLayout(40, 20, (16, 8), conv=POINTWISE, mask=mask)
    shape = (layout.capacity, layout.block.inputs, layout.block.outputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    values, bias = normal(*shape), normal(40)
    x, dy = (normal(2, channels, 3, 5) for channels in (20, 40))
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    conv, index, on = POINTWISE, layout.index, torch.tensor(True)

    def results(backend: Backend) -> list[Tensor]:
        y = backend.conv2d_forward(x, values, bias, index, 40, conv, channels_last)
        dx = backend.conv2d_dgrad(dy, values, index, list(x.shape), conv, channels_last)
        for image in (y, dx):
            assert image.is_contiguous(
                memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )
        dw = backend.conv2d_wgrad(dy, x, index, layout.capacity, layout.block, conv)
        probed = backend.conv2d_probe(dy, x, index, layout.capacity, layout.block, conv, on)
        return [y, dx, dw, *backend.conv2d_wgrad_saliency(dy, x, values, index, conv), probed]

    return results


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "backend", [OverPixels(reference), OverPixels(cpu), cpu], ids=["pixels", "cpu's pixels", "cpu"]
)
def test_over_pixels_and_as_a_convolution_it_is_the_same(backend: Backend, channels_last: bool) -> None:
    results = _results(channels_last)
    for found, expected in zip(results(backend), results(reference), strict=True):
        torch.testing.assert_close(found, expected)


def test_images_of_as_many_pixels_in_another_shape_are_refused() -> None:
    """As matrices of pixels they would fit."""
    layout = BlockLayout(16, 16, 16, conv=POINTWISE)
    values, on = torch.zeros(layout.capacity, 16, 16), torch.tensor(True)
    x, dy = torch.zeros(2, 16, 3, 5), torch.zeros(2, 16, 5, 3)
    over_pixels, index, conv = OverPixels(cpu), layout.index, POINTWISE
    for call in (
        lambda: over_pixels.conv2d_dgrad(dy, values, index, [2, 16, 3, 5], conv),
        lambda: over_pixels.conv2d_wgrad(dy, x, index, layout.capacity, layout.block, conv),
        lambda: over_pixels.conv2d_wgrad_saliency(dy, x, values, index, conv),
        lambda: over_pixels.conv2d_probe(dy, x, index, layout.capacity, layout.block, conv, on),
    ):
        with pytest.raises(ValueError, match=r"expected dy \[2, 16, 3, 5\], got shape \(2, 16, 5, 3\)"):
            call()
