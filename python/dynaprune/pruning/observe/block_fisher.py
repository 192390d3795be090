"""One-shot scores of the blocks of a trained network, from the gradients of a calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.calibration_mode import calibration_mode

Calibration = Callable[[nn.Module], Iterable[Tensor]]
_SEED = 0


def block_fisher(
    model: nn.Module, layers: Mapping[str, BlockSparseLayer], calibration: Calibration
) -> dict[str, Tensor]:
    """The diagonal block Fisher information along the weights: E[(sum over the block of w·dL/dw)^2].

    Half of it is the rise of the loss when the block becomes zero, to second order, where the mean gradient
    is zero (Theis et al. 2018, arXiv:1801.05787, for whole channels). A gradient is reduced to its blocks'
    sums as soon as it is there: one layer's at a time is held.

    Args:
        layers: the layers, with all their blocks.
        calibration: ``calibration(model)`` yields scalar losses with gradients, of one sample or of a batch
            each; the mean is over what it yields. The model evaluates as in a trial: without dropout, norms
            by the batch's statistics.

    Returns:
        Float64 ``[rows, columns]`` on the host by layer.

    Raises:
        TypeError, ValueError: no loss, or one that is no finite scalar with a gradient.
    """
    sums = {name: torch.zeros(layer.layout.blocks, dtype=torch.float64) for name, layer in layers.items()}
    needed = {id(layer.values) for layer in layers.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in needed]
    grads = {name: layer.values.grad for name, layer in layers.items()}
    handles = [_watch(layer, sums[name]) for name, layer in layers.items()]
    count = 0
    try:
        for layer in layers.values():
            layer.values.grad = None
        for parameter in others:
            parameter.requires_grad_(False)
        with calibration_mode(model, _SEED), torch.enable_grad():
            for loss in calibration(model):
                _check(loss)
                loss.backward()
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for parameter in others:
            parameter.requires_grad_(True)
        for name, layer in layers.items():
            layer.values.grad = grads[name]
    if not count:
        raise ValueError("expected calibration(model) to yield losses, got none")
    return {name: (sums[name] / count).view(layer.layout.mask.shape) for name, layer in layers.items()}


def _watch(layer: BlockSparseLayer, total: Tensor) -> Any:
    block = layer.layout.block_of_slot.long().cpu()

    def reduce(values: Tensor) -> None:
        assert values.grad is not None
        gate = (values.detach() * values.grad).sum((1, 2), dtype=torch.float64).cpu()
        total[block] += gate.square()
        values.grad = None

    return layer.values.register_post_accumulate_grad_hook(reduce)


def _check(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected calibration(model) to yield tensors, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.requires_grad or not bool(loss.isfinite()):
        raise ValueError(
            "expected calibration(model) to yield finite scalar losses with gradients, got shape "
            f"{tuple(loss.shape)}, requires_grad={loss.requires_grad}, {loss.detach().flatten()[:3].tolist()}"
        )
