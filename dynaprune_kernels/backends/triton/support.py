"""What the Triton kernels can run, told without importing triton."""

from __future__ import annotations

import functools
import importlib.metadata
import os

import torch
from packaging.version import Version

from dynaprune_kernels.geometry import Block

LEAST_VERSION = "3.6"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (16, 32, 64, 128)


@functools.cache
def against_installed() -> str | None:
    """Why no kernel can run in this process; None where triton is there."""
    for distribution in ("triton", "pytorch-triton"):  # the second comes with torch's nightly builds
        try:
            version = importlib.metadata.version(distribution)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        return "the package triton is not installed"
    if Version(version) < Version(LEAST_VERSION):
        return f"expected triton {LEAST_VERSION} or newer, got {version}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, device_type: str, dtype: torch.dtype, block: Block | None = None) -> str | None:
    """The reason why the Triton kernels cannot run ``op``; None if they can.

    Args:
        block: None for ops that do not depend on them.
    """
    reason = against_installed()
    if reason is not None:
        return reason
    if device_type != "cuda" and not (interpreted() and device_type == "cpu"):
        return f"the triton kernels run on CUDA tensors (on CPU with TRITON_INTERPRET=1), got {device_type}"
    if op == "layout_update":
        return None
    if dtype not in DTYPES:
        return f"the triton kernels take float16, bfloat16 and float32, got {dtype}"
    if interpreted() and dtype == torch.bfloat16:
        return "Triton's interpreter computes wrong results in bfloat16"
    if block is not None and not all(size in BLOCKS for size in block):
        return f"the triton kernels take blocks of 16, 32, 64 and 128, got {tuple(block)}"
    return None
