"""What the host knows about a call: all that a choice of backend or of a tile size may depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dynaprune_kernels.geometry import Block


class Problem(NamedTuple):
    """One call of an op.

    Attributes:
        op: a function name of the backend modules; ``linear_wgrad`` also stands for wgrad with saliency.
        block: None for ops that do not depend on it.
        tokens: rows of the activation; of a convolution batch x height x width.
        outputs: of the weight.
        inputs: of the weight, those of one group times the taps for a convolution.
        capacity: slots of the layer.
    """

    op: str
    dtype: torch.dtype
    block: Block | None = None
    tokens: int = 0
    outputs: int = 0
    inputs: int = 0
    capacity: int = 0

    @property
    def density(self) -> float:
        """Share of the dense weight that the capacity holds."""
        if self.block is None:
            return 0.0
        bo, bi = self.block
        return self.capacity * bo * bi / max(self.outputs * self.inputs, 1)
