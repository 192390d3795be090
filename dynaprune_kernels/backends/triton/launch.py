"""Launching kernels: the device's limits and the precision of float32 products."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynaprune_kernels.backends.precision import tf32_allowed
from dynaprune_kernels.backends.triton import support


class Device(NamedTuple):
    """What a configuration must fit."""

    name: str
    capability: int  # 10 x major + minor
    processors: int
    shared_bytes: int  # that one program may use


OPTIONS = {"enable_fp_fusion": True}  # stated, because Triton's default is about to change
INTERPRETER = Device("interpreter", 90, 4, 232448)


@functools.cache
def _cuda_device(number: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(number)
    return Device(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def device_of(tensor: Tensor) -> Device:
    """The limits of the device that holds ``tensor``."""
    return _cuda_device(tensor.get_device()) if tensor.is_cuda else INTERPRETER


def precision(dtype: torch.dtype, *, conv: bool) -> str:
    """How ``tl.dot`` multiplies: float32 follows torch's own switch for cuBLAS or cuDNN.

    Where torch may use TF32 so do these kernels; else three TF32 products make up one of float32 precision.
    16-bit types have one way only.
    """
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if tf32_allowed(conv=conv) else "tf32x3"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of its tensors; an empty grid is nothing to do."""
    if 0 in grid:
        return
    tensor = next(argument for argument in args if isinstance(argument, Tensor))
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        guard: Any = torch.cuda.device(tensor.device)
    else:
        guard = contextlib.nullcontext()
    if support.interpreted():
        options = {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
    else:
        options |= OPTIONS
    with guard:
        kernel[grid](*args, **options)
