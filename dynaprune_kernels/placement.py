"""Tensors that go along with a module and are no buffers: nothing averages, casts or broadcasts them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``tensor`` in the place where ``fn`` puts tensors, with its own dtype, shape and values.

    Args:
        tensor: of a dtype and with values that have to stay.
        fn: what ``nn.Module._apply`` is called with: it moves, casts, shares, or (``to_empty``) allocates. It
            sees a clone.

    Returns:
        ``tensor`` itself where its place does not change. A tensor that leaves the meta device has no values.
    """
    with torch.inference_mode(False), torch.no_grad():
        place = fn(tensor.clone())
        if place.dtype != tensor.dtype or place.shape != tensor.shape:
            place = torch.empty_like(tensor, device=place.device)
        if _place(place) == _place(tensor):
            return tensor
        if not place.is_meta and not tensor.is_meta:
            place.copy_(tensor)
    return place


def _place(tensor: Tensor) -> tuple[torch.device, bool, bool]:
    if tensor.is_meta:
        return tensor.device, False, False
    return tensor.device, tensor.is_shared(), tensor.is_pinned()
