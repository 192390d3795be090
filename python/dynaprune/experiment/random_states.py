"""The global random states of torch, numpy and Python, as plain values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["random_states", "set_random_states"]


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of torch (of a CUDA ``device`` too), numpy and Python: tensors and plain values. Draws
    nothing."""
    kind, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, pending = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(kind), np.asarray(key).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), pending],
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Go on from what `random_states` gave for the same ``device``."""
    torch.set_rng_state(states["torch"].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"].clone(), device)
    kind, key, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, pending = states["python"]
    random.setstate((version, tuple(internal), pending))
