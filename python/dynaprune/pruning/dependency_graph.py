"""Torch-Pruning's dependency graph of a model with block-sparse layers, from one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from dynaprune.pruning.calibration import calibration_mode
from dynaprune.pruning.example_inputs import ExampleInputs, tensors_in


class _BlockSparsePruner(torch_pruning.BasePruningFunc):
    """Tells the dependency graph the widths of block-sparse layers; the cutting itself is ``surgery``'s."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError("block-sparse layers are cut by dynaprune.pruning.surgery")

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        raise NotImplementedError("block-sparse layers are cut by dynaprune.pruning.surgery")

    def get_out_channels(self, layer: Any) -> int:
        return layer.layout.out_features

    def get_in_channels(self, layer: Any) -> int:
        return layer.layout.in_features


def trace(model: nn.Module, example: ExampleInputs) -> Any:
    """Torch-Pruning's graph; every output of the model ends in a node of its own, so no layer looks free."""

    def outputs(out: Any) -> list[Tensor]:
        tensors = [t for t in tensors_in(out) if t.requires_grad]
        if not tensors:
            raise ValueError("expected a model whose outputs depend on its parameters, got none that does")
        return [t * 1 for t in tensors]

    pruner = _BlockSparsePruner()
    types = (BlockSparseLinear, BlockSparseConv2d, BlockSparseConv1d)
    graph = torch_pruning.DependencyGraph()
    with (
        calibration_mode(model),
        torch.enable_grad(),
        _all_require_grad(model),
        _as_single_ops(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model,
            example,
            forward_fn=lambda model, example: example.forward(model),
            output_transform=outputs,
            customized_pruners=dict.fromkeys(types, pruner),
            verbose=False,
        )
    return graph


@contextmanager
def _all_require_grad(model: nn.Module) -> Iterator[None]:
    """Autograd sees every layer, frozen ones too."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _as_single_ops(model: nn.Module) -> Iterator[None]:
    """Block-sparse layers run as the one dense op they stand for, which is what the tracer understands."""
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLayer)]
    try:
        for layer in layers:
            layer.forward = _dense_op(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _dense_op(layer: Any) -> Callable[[Tensor], Tensor]:
    conv = layer.layout.conv

    def forward(x: Tensor) -> Tensor:
        weight = layer.weight.requires_grad_()
        if conv is None:
            return F.linear(x, weight, layer.bias)
        stride, padding, dilation = conv[2:4], conv[4:6], conv[6:8]
        x, bias = layer._padded(x), layer.bias
        if isinstance(layer, BlockSparseConv1d):
            return F.conv1d(x, weight, bias, stride[1:], padding[1:], dilation[1:], conv.groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, conv.groups)

    return forward
