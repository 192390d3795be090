"""The Triton backend: the functions of :mod:`dynaprune_kernels.backends.cpu` for NVIDIA GPUs.

``kernels/`` holds the raw kernels, the modules here their launchers. Importing this package does not import
triton; the first call does. :func:`dynaprune_kernels.backends.triton.support.why_not` tells what cannot run.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "linear_forward": "linear",
    "linear_dgrad": "linear",
    "linear_wgrad": "linear",
    "linear_wgrad_saliency": "linear",
    "linear_probe": "linear",
    "conv2d_forward": "conv2d",
    "conv2d_dgrad": "conv2d",
    "conv2d_wgrad": "conv2d",
    "conv2d_wgrad_saliency": "conv2d",
    "conv2d_probe": "conv2d",
    "block_saliency": "saliency",
    "layout_update": "layout",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = function
    return function
