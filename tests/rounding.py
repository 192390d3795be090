"""Outputs of two models that hold the same weights: equal but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two float tensors of one shape and dtype differ by rounding alone.

    A vendor library may sum in another order where a tensor is aligned otherwise, so equal weights do not
    promise equal bits: torch aligns what it allocates at 64 bytes, but not what `from_pretrained` maps from a
    file. The bound is 64 units in the last place of the largest expected value.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    largest = expected.detach().abs().max() if expected.numel() else torch.zeros(())
    bound = 64 * torch.finfo(expected.dtype).eps * largest
    return bool(((found - expected).detach().abs() <= bound).all())
