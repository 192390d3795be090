"""Which precision float32 products on a GPU have: torch's own switches for cuBLAS and cuDNN say."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch


def tf32_allowed(*, conv: bool) -> bool:
    """Whether torch may multiply float32 matrices, or images, in TF32."""
    switch: Any = getattr(torch.backends.cudnn, "conv", None) if conv else torch.backends.cuda.matmul
    stated = getattr(switch, "fp32_precision", "none")
    if stated != "none":
        return stated == "tf32"
    _read_quietly()
    return torch.backends.cudnn.allow_tf32 if conv else torch.backends.cuda.matmul.allow_tf32


@functools.cache
def _read_quietly() -> None:
    """The first look at the older switches, at which some versions of torch warn, once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
