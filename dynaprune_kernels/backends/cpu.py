"""The C++ CPU kernels of ``csrc/cpu``, through their raw ops ``torch.ops.dynaprune_cpu``.

Every backend has these functions; those of the same names in :mod:`dynaprune_kernels.reference` say what each
takes and returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynaprune_kernels import _extension
from dynaprune_kernels.geometry import Block, ConvGeometry, ceil_div

_raw = torch.ops.dynaprune_cpu


def capability() -> str | None:
    """What the kernels use: avx512, avx2, neon or generic instructions; None where they are not loaded."""
    return str(_raw.capability()) if _extension.load().loaded else None


def scratch_bytes(*, restart: bool = False) -> tuple[int, int]:
    """Bytes of the kernels' scratch memory, which belongs to no tensor: those that all threads hold, and the
    most that they held since the last restart of the count.

    A convolution's scratch memory stays with the thread that calls it, for the next call. Zeros where no
    kernels are loaded that count it.

    Args:
        restart: begin the count of the most anew, at what is held.
    """
    counter = getattr(_raw, "scratch_bytes", None) if _extension.load().loaded else None
    held, most = counter(restart) if counter is not None else (0, 0)
    return held, most


def linear_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Tensor, out_features: int
) -> Tensor:
    return _raw.linear_forward(x, values, bias, index, out_features)


def linear_dgrad(dy: Tensor, values: Tensor, index: Tensor, in_features: int) -> Tensor:
    return _raw.linear_dgrad(dy, values, index, in_features)


def linear_wgrad(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block) -> Tensor:
    bo, bi = block
    return _raw.linear_wgrad(dy, x, index, capacity, bi, bo)


def linear_wgrad_saliency(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return _raw.linear_wgrad_saliency(dy, x, values, index)


def linear_probe(dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, probe: Tensor) -> Tensor:
    bo, bi = block
    if not probe:
        return _no_probe(ceil_div(dy.shape[1], bo) * ceil_div(x.shape[1], bi), x)
    return _raw.linear_probe(dy, x, index, capacity, bi, bo)


def conv2d_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    out_channels: int,
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    return _raw.conv2d_forward(x, values, bias, index, out_channels, conv, channels_last)


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    index: Tensor,
    input_size: list[int],
    conv: ConvGeometry,
    channels_last: bool = True,
) -> Tensor:
    return _raw.conv2d_dgrad(dy, values, index, input_size, conv, channels_last)


def conv2d_wgrad(
    dy: Tensor, x: Tensor, index: Tensor, capacity: int, block: Block, conv: ConvGeometry
) -> Tensor:
    bo, bi = block
    return _raw.conv2d_wgrad(dy, x, index, capacity, bi, bo, conv)


def conv2d_wgrad_saliency(
    dy: Tensor, x: Tensor, values: Tensor, index: Tensor, conv: ConvGeometry
) -> tuple[Tensor, Tensor]:
    return _raw.conv2d_wgrad_saliency(dy, x, values, index, conv)


def conv2d_probe(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    capacity: int,
    block: Block,
    conv: ConvGeometry,
    probe: Tensor,
) -> Tensor:
    bo, bi = block
    if not probe:
        columns = conv.taps * ceil_div(x.shape[1] // conv.groups, bi)
        return _no_probe(ceil_div(dy.shape[1], bo) * columns, x)
    return _raw.conv2d_probe(dy, x, index, capacity, bi, bo, conv)


def _no_probe(blocks: int, x: Tensor) -> Tensor:
    return x.new_zeros(blocks, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def block_saliency(
    values: Tensor, grad: Tensor, index: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    return _raw.block_saliency(values, grad, index, rows, columns)


def layout_update(
    mask: Tensor,
    slot_of_block: Tensor,
    index: Tensor,
    capacity: int,
    conv: ConvGeometry | None,
    release: bool,
) -> None:
    conv = conv or ConvGeometry(1, 1)
    _raw.layout_update(
        mask, slot_of_block, index, capacity, conv.groups, conv[0:2], conv[2:4], conv[6:8], release
    )
