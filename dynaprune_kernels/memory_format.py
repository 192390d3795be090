"""Which memory format a convolution answers in: the rule of PyTorch's own convolutions.

Output and input gradient are channels-last where the input's or the weight's strides are those of
channels-last memory, else contiguous (``determine_backend_memory_format`` in ATen's ``Convolution.cpp``).
Where sizes of 1 leave both open, strides decide as they do in ATen's ``suggest_memory_format``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INNERMOST_FIRST = (1, 3, 2, 0)


def suggests_channels_last(image: Tensor) -> bool:
    """Whether ATen takes ``[N, C, H, W]`` for channels-last: from C over W and H to N, strides never shrink.

    Raises:
        ValueError: a tensor that has not four dimensions.
    """
    if image.dim() != 4:
        raise ValueError(f"expected a tensor of four dimensions, got shape {tuple(image.shape)}")
    sizes, strides = image.shape, image.stride()
    least = 0
    if strides[1] == 0:
        return False
    for dim in _INNERMOST_FIRST:
        if strides[dim] < least:
            return False
        if dim == 0:
            return bool(least != strides[1])  # [N, 1, 1, 1] counts as contiguous
        least = strides[dim] * sizes[dim] if sizes[dim] > 1 else strides[dim]
    return False


def only_contiguous(image: Tensor) -> bool:
    """Whether ``[N, C, H, W]`` is contiguous and not channels-last at the same time."""
    return image.is_contiguous() and not image.is_contiguous(memory_format=torch.channels_last)


def answers_channels_last(image: Tensor, wanted: bool | None) -> bool:
    """Whether a convolution of ``image`` is answered in channels-last memory; by default as ``image`` is."""
    if image.device.type == "cuda" and image.dtype == torch.float64:
        return False  # ATen gives cuDNN float64 in contiguous memory only
    return suggests_channels_last(image) if wanted is None else wanted


def new_image(like: Tensor, size: tuple[int, ...] | list[int], channels_last: bool) -> Tensor:
    """Uninitialised ``size`` with the dtype and device of ``like``; strides of sizes of 1 are canonical."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory)


def in_format(image: Tensor, channels_last: bool) -> Tensor:
    """``image`` itself where its strides are exactly those of the format, else a copy that has them."""
    _, c, h, w = image.shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return image if image.stride() == strides else new_image(image, image.shape, channels_last).copy_(image)
