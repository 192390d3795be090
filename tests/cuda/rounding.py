"""The kernels' element types in numpy; bfloat16 as its bits."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

EPS = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7, "tf32": 2.0**-10}


def rounded(a: Array, dtype: str) -> Array:
    """``a`` in the type, to nearest, ties to even: float32, float16, or uint16 for bf16."""
    if dtype == "f16":
        return a.astype(np.float16)
    single = np.ascontiguousarray(a, np.float32)
    if dtype == "f32":
        return single
    bits = single.view(np.uint32)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), nearest)


def widened(a: Array, dtype: str) -> Array:
    """The values of an array of the type, in float64."""
    if dtype == "bf16":
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)
