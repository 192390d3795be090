"""Notices that a layer's dense weight is read in every training step, and by whom."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn

_STEPS_TO_NOTICE = 3
_CHANGES_PER_STEP = 16


class WeightReads:
    """Says once, with the layer's name, that its weight is built in one training step after the other.

    Args:
        name: of the layer, for the message.

    Attributes:
        reader: type of the module in whose forward the weight was built for training, empty if in none.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.reader = ""
        self.told = False
        self._steps = 0
        self._version = -1

    def note(self, version: int) -> None:
        """The weight was built; ``version`` grows as ``values`` change, by a few per optimizer step."""
        if not self.reader and torch.is_grad_enabled():
            self.reader = _running_module()
        if 0 < version - self._version <= _CHANGES_PER_STEP and self._version >= 0:
            self._steps += 1
        elif version != self._version:
            self._steps = 0
        self._version = version
        if self._steps >= _STEPS_TO_NOTICE and not self.told:
            self.told = True
            warnings.warn(
                f"the weight of layer {self.name or '(unnamed)'} is read in every training step, which "
                "builds the dense weight each time: it works, but costs what a dense layer costs. Use the "
                "layer's `values` (the live blocks) instead, or exclude the layer from pruning",
                RuntimeWarning,
                stacklevel=2,
            )


def _running_module() -> str:
    """Type of the innermost module that is being called, by the stack of frames; empty where none is."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            return type(frame.f_locals["self"]).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return ""
