"""Strides as PyTorch compares memory formats by them."""

from __future__ import annotations

from torch import Tensor


def strides_that_count(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element; none of an empty tensor."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in strides if size > 1] if tensor.numel() else []
