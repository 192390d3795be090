"""Give a Parameter data of another shape while optimizers, clipping lists and hooks go on holding it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def replace_parameter_data_(parameter: nn.Parameter, data: Tensor, grad: Tensor | None = None) -> None:
    """Make ``data`` (any shape, same device) the data of ``parameter`` and ``grad`` its gradient, in place.

    A graph that somebody still holds (the last loss) keeps this parameter's old gradient accumulator alive,
    which would reject gradients of the new shape; data of another dtype in between makes autograd drop it.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data
    parameter.grad = grad
