"""A pointwise convolution on a GPU: a linear layer over pixels, packed index included."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dynaprune_kernels.backends import cuda, triton
from dynaprune_kernels.backends.alignment import image, pixels
from dynaprune_kernels.geometry import Block, ConvGeometry
from dynaprune_kernels.memory_format import in_format


def convolutions(backend: ModuleType, conv: ConvGeometry) -> ModuleType | OverPixels:
    """What has the ``conv2d_`` functions of ``backend`` for ``conv``.

    The CPU kernels and the vendor's library count pointwise convolutions among the others.
    """
    return OverPixels(backend) if conv.pointwise and backend in (cuda, triton) else backend


class OverPixels:
    """The ``conv2d_`` functions of a backend for pointwise convolutions, from its ``linear_`` ones."""

    def __init__(self, backend: ModuleType) -> None:
        self.backend = backend

    def conv2d_forward(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: Tensor,
        out_channels: int,
        conv: ConvGeometry,
        channels_last: bool = True,
    ) -> Tensor:
        y = self.backend.linear_forward(pixels(x), values, bias, index, out_channels)
        return in_format(image(y, x.shape), channels_last)

    def conv2d_dgrad(
        self,
        dy: Tensor,
        values: Tensor,
        index: Tensor,
        input_size: list[int],
        conv: ConvGeometry,
        channels_last: bool = True,
    ) -> Tensor:
        dx = self.backend.linear_dgrad(pixels(dy), values, index, input_size[1])
        return in_format(image(dx, dy.shape), channels_last)

    def conv2d_wgrad(
        self, dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry
    ) -> Tensor:
        return self.backend.linear_wgrad(pixels(dy), pixels(x), index, capacity, block)

    def conv2d_wgrad_saliency(
        self, dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        return self.backend.linear_wgrad_saliency(pixels(dy), pixels(x), values, index)

    def conv2d_probe(
        self,
        dy: Tensor,
        x: Tensor,
        index: Tensor,
        capacity: int,
        block: Block,
        conv: ConvGeometry,
        probe: Tensor,
    ) -> Tensor:
        return self.backend.linear_probe(pixels(dy), pixels(x), index, capacity, block, probe)
