"""Activations in the memory that GPU kernels read: 16 bytes at a time, from multiples of 16 elements.

What is not so already is copied, once per call: loads of single elements would cost more, in registers most
of all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaprune_kernels.backends.memory import with_memory


@with_memory
def aligned_rows(x: Tensor) -> Tensor:
    """``x`` with rows that start at multiples of 16 elements, its width rounded up to one with zeros."""
    if x.shape[1] % 16:
        return F.pad(x, (0, -x.shape[1] % 16)).contiguous()
    apart = x.stride(0) % 16 == 0 and x.stride(0) >= x.shape[1]
    return (
        x
        if apart and x.stride(1) == 1 and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


@with_memory
def aligned_channels(x: Tensor, groups: int = 1) -> Tensor:
    """``[N, C, H, W]`` as contiguous ``[N, H, W, C]``; zeros make each group's channels a multiple of 16."""
    images = channels_last(x).permute(0, 2, 3, 1)
    channels = x.shape[1] // groups
    if channels % 16:
        images = F.pad(images.unflatten(3, (groups, channels)), (0, -channels % 16)).flatten(3)
    images = images.contiguous()
    return images if images.data_ptr() % 16 == 0 else images.clone()


@with_memory
def aligned_blocks(values: Tensor) -> Tensor:
    """``values [capacity, bi, bo]``, contiguous."""
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


def channels_last(x: Tensor) -> Tensor:
    """``x`` in channels-last memory."""
    return x.contiguous(memory_format=torch.channels_last)


@with_memory
def pixels(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as a matrix ``[N * H * W, C]``."""
    return channels_last(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image(pixels: Tensor, like: torch.Size) -> Tensor:
    """The inverse of :func:`pixels`, for ``N, H, W`` of ``like``, in channels-last memory."""
    return pixels.view(like[0], like[2], like[3], pixels.shape[1]).permute(0, 3, 1, 2)
