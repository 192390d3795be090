"""Tensors whose storage is smaller than they say, which torch's own ops read and write beyond.

``untyped_storage().resize_`` takes memory away and leaves the sizes. The compiled kernels check it
themselves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def check_memory(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError where the storage does not hold all elements of ``tensor``."""
    size = tensor.untyped_storage().nbytes()
    if tensor.nbytes <= size and tensor.storage_offset() == 0 and tensor.is_contiguous():
        return
    if tensor.numel() == 0:
        return
    last = tensor.storage_offset()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (length - 1) * stride
    if last >= size // tensor.element_size():
        raise ValueError(
            f"{op}: expected {name} {list(tensor.shape)} with its memory, got a storage of {size} bytes"
        )


def with_memory(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """``function``, which raises ValueError where a tensor among its positional arguments lacks memory."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: _Given.args, **keywords: _Given.kwargs) -> _Result:
        for name, argument in zip(names, args, strict=False):
            if isinstance(argument, Tensor):
                check_memory(function.__name__, name, argument)
        return function(*args, **keywords)

    return checked
