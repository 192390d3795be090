"""A pointwise convolution in channels-last memory: a linear layer over pixels, packed index included."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dynaprune_kernels.backends import cpu, cuda, triton
from dynaprune_kernels.backends.alignment import image, pixels
from dynaprune_kernels.geometry import Block, ConvGeometry
from dynaprune_kernels.memory_format import in_format, only_contiguous


def convolutions(
    backend: ModuleType, conv: ConvGeometry, *images: Tensor, channels_last: bool = True
) -> ModuleType | OverPixels:
    """What has the ``conv2d_`` functions of ``backend`` for ``conv``.

    GPU kernels read channels-last memory alone. The CPU kernels of convolutions read and write contiguous
    images as they are, so there ``images`` and the answer have to be channels-last as well. The vendor's
    library counts pointwise convolutions among the others.

    Args:
        images: operands of the call.
        channels_last: whether it answers in channels-last memory, if with an image.
    """
    if not conv.pointwise or backend not in (cpu, cuda, triton):
        return backend
    if backend is cpu and not (channels_last and not any(map(only_contiguous, images))):
        return backend
    return OverPixels(backend)


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
        _check_positions("conv2d_dgrad", dy, (input_size[0], *input_size[2:]))
        dx = self.backend.linear_dgrad(pixels(dy), values, index, input_size[1])
        return in_format(image(dx, dy.shape), channels_last)

    def conv2d_wgrad(
        self, dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry
    ) -> Tensor:
        _check_positions("conv2d_wgrad", dy, _positions(x))
        return self.backend.linear_wgrad(pixels(dy), pixels(x), index, capacity, block)

    def conv2d_wgrad_saliency(
        self, dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        _check_positions("conv2d_wgrad_saliency", dy, _positions(x))
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
        _check_positions("conv2d_probe", dy, _positions(x))
        return self.backend.linear_probe(pixels(dy), pixels(x), index, capacity, block, probe)


def _positions(image: Tensor) -> tuple[int, ...]:
    return (image.shape[0], *image.shape[2:])


def _check_positions(op: str, dy: Tensor, of_input: tuple[int, ...]) -> None:
    if _positions(dy) != of_input:
        n, h, w = of_input
        raise ValueError(f"{op}: expected dy [{n}, {dy.shape[1]}, {h}, {w}], got shape {tuple(dy.shape)}")
