"""What constant neurons feed to the layers that read them, and how it moves into those layers' biases."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.neurons.example_inputs import ExampleInputs, tensors_in
from dynaprune.nn import BlockSparseConv2d, BlockSparseLayer
from dynaprune.nn.calibration_mode import calibration_mode

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_SAME, _SAME_AVERAGED = 8.0, 256.0
_STATISTICS_AGREE = 1e-3


@dataclass(frozen=True)
class Observation:
    """One forward pass: the model's outputs, and per reader the least and greatest value of each input.

    ``layers``: for every layer that was asked for, the mean of each output and of its absolute value over all
    positions, summed over calls: float64 ``[2, out]``, and the eps of its dtype.
    """

    outputs: list[Tensor]
    ranges: dict[str, tuple[Tensor, Tensor]]
    layers: dict[str, tuple[Tensor, float]] = field(default_factory=dict)


def observe(
    model: nn.Module,
    example: ExampleInputs,
    readers: Collection[str] = (),
    *,
    layers: Collection[str] = (),
    batch_statistics: bool = False,
    training: bool = False,
) -> Observation:
    """Run the model in evaluation mode and look at the inputs of ``readers``; nothing of the model changes.

    Args:
        layers: whose outputs to average.
        batch_statistics: norm layers normalise by the batch, as in training.
        training: every module in its own mode instead; no norm layer's statistics change.
    """
    flags = {module: module.training for module in model.modules()}
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    means: dict[str, tuple[Tensor, float]] = {}
    handles = []
    for name in layers:
        module = model.get_submodule(name)
        handles.append(module.register_forward_hook(_average(name, module, means)))
    for name in readers:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(_watch(name, module, ranges), with_kwargs=True))
    try:
        # grad mode keeps nn.TransformerEncoderLayer off its fused path, which would run no hooks
        with calibration_mode(model), torch.enable_grad():
            if not batch_statistics:
                for module, flag in flags.items():
                    module.training = flag and training
            outputs = [t.detach() for t in tensors_in(example.forward(model))]
    finally:
        for handle in handles:
            handle.remove()
    return Observation(outputs, ranges, means)


def _average(name: str, module: nn.Module, means: dict[str, tuple[Tensor, float]]) -> Any:
    feature_dim = -1 - _spatial_dims(module)

    def hook(_: nn.Module, __: Any, y: Tensor) -> None:
        features = y.detach().movedim(feature_dim, -1).reshape(-1, y.shape[feature_dim]).double()
        mean = torch.stack([features.mean(0), features.abs().mean(0)])
        if name in means:
            mean = mean + means[name][0]
        means[name] = mean, torch.finfo(y.dtype).eps

    return hook


def _watch(name: str, module: nn.Module, ranges: dict[str, tuple[Tensor, Tensor]]) -> Any:
    feature_dim = -1 - _spatial_dims(module)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        features = x.movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim])
        low, high = features.amin(0), features.amax(0)
        if name in ranges:
            low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
        ranges[name] = (low, high)

    return hook


def _spatial_dims(module: nn.Module) -> int:
    if isinstance(module, BlockSparseConv2d):
        return len(module.kernel_size)
    return module.weight.dim() - 2  # type: ignore[operator]


def constants(observed: Observation, reader: str, index: Tensor) -> Tensor:
    """The values of inputs ``index`` of ``reader``, float64."""
    low, high = (side[index.to(side.device)].double() for side in observed.ranges[reader])
    return (low + high) / 2


def cannot_fold(
    reader: nn.Module,
    name: str,
    index: Tensor,
    running: Observation,
    batch: Observation,
    *,
    averaged: bool = False,
) -> str:
    """Why inputs ``index`` of a reader cannot move into its bias, empty where they can.

    Args:
        running, batch: observed with running and with batch statistics.
        averaged: the inputs are averages by weights that sum to one, up to rounding.
    """
    same = _SAME_AVERAGED if averaged else _SAME
    for observed in (running, batch):
        if name not in observed.ranges:
            return f"the forward pass of the example inputs does not call {name!r}"
        low, high = (side[index.to(side.device)] for side in observed.ranges[name])
        eps = torch.finfo(low.dtype).eps
        if not bool((high - low <= same * eps * torch.maximum(low.abs(), high.abs())).all()):
            return f"{name!r} reads values that differ over the batch or between calls"
    value, other = constants(running, name, index), constants(batch, name, index)
    if not bool(((value - other).abs() <= _STATISTICS_AGREE * (1 + value.abs())).all()):
        return "a batch norm's running statistics have not caught up with the dead neurons yet"
    if not bool(value.any()):
        return ""
    if getattr(reader, "bias", None) is None:
        return f"{name!r} has no bias to take up their constant output"
    if _pads_with_zeros(reader):
        return f"{name!r} pads its input with zeros: a constant input is none at the border"
    return ""


def _pads_with_zeros(reader: Any) -> bool:
    if isinstance(reader, BlockSparseConv2d):
        conv = reader.layout.conv
        own = conv is not None and (conv.padding_h > 0 or conv.padding_w > 0)
        return own or (reader.padding_mode == "zeros" and any(reader.pad_before or ()))
    if isinstance(reader, nn.modules.conv._ConvNd):
        return reader.padding_mode == "zeros" and any(reader._reversed_padding_repeated_twice)
    return False


def contribution(reader: Any, observed: Observation, name: str, index: Tensor) -> Tensor:
    """What constant inputs ``index`` add to every output of ``reader``: ``[out]`` float64."""
    sparse = isinstance(reader, BlockSparseLayer)
    weight = reader.to_dense_shape(reader.values) if sparse else reader.weight.detach()
    chosen = weight.index_select(1, index.to(weight.device)).double()
    return chosen.reshape(*chosen.shape[:2], -1).sum(2) @ constants(observed, name, index).to(chosen.device)
