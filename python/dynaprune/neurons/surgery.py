"""Cut outputs and inputs out of layers, with gradients and optimizer state; take a cut back if it was wrong.

Every Parameter stays the same object: optimizers, clipping lists and hooks go on holding the right thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.optimizer_state import rewrite_state, sliced_state
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune.nn.shape import layer_shape, note_original_widths_, original_widths
from dynaprune_kernels.memory_format import suggests_channels_last

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def gather_slots(by_slot: Tensor, old_slot: Tensor) -> Tensor:
    """``by_slot [old, bi, bo]`` in the order of ``old_slot [new]``, slots to copy from; -1 gives zeros."""
    return by_slot.detach()[old_slot.clamp(min=0)].masked_fill_((old_slot < 0).view(-1, 1, 1), 0)


def is_depthwise(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution with one group per channel, in and out."""
    return (
        isinstance(module, _CONVOLUTIONS)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def is_channelwise(module: nn.Module) -> bool:
    """Whether output channel i of ``module`` comes from input channel i alone and both are cut together."""
    return isinstance(module, (*_CHANNEL_NORMS, nn.PReLU)) or is_depthwise(module)


def cannot_cut(module: nn.Module) -> str:
    """Why no output or input of ``module`` may be cut, empty where it may."""
    if isinstance(module, BlockSparseLayer):
        conv = module.layout.conv
        return "it is a convolution with groups" if conv is not None and conv.groups > 1 else ""
    if nn.utils.parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        return "its weight is parametrized"
    if "weight" in vars(module):
        return "its weight is computed from other tensors"
    if isinstance(module, nn.LayerNorm):
        return "LayerNorm over a narrower width computes another function"
    if layer_shape(module) is None:
        return f"layers of type {type(module).__name__} cannot be cut"
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module):
        return "it is a convolution with groups"
    return ""


class Surgery:
    """Cuts into one model and its optimizers that :meth:`undo` takes back.

    Args:
        optimizers: whose state is cut along.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        self.optimizers = list(optimizers)
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put everything back as it was before the first cut, the latest first."""
        while self._undo:
            self._undo.pop()()

    def set_(self, owner: Any, name: str, value: Any) -> None:
        """Assign an attribute (a width, a buffer)."""
        old = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def map_(self, parameter: nn.Parameter | None, change: Callable[[Tensor], Tensor]) -> None:
        """Put data, gradient and optimizer tensors of its shape through ``change``, which may reshape."""
        if parameter is None:
            return
        data, grad = parameter.data, parameter.grad
        states = list(sliced_state(self.optimizers, parameter))

        def restore() -> None:
            replace_parameter_data_(parameter, data, grad)
            for state, key, tensor in states:
                state[key] = tensor

        self._undo.append(restore)
        rewrite_state(self.optimizers, parameter, change)
        replace_parameter_data_(parameter, change(data), None if grad is None else change(grad))

    def add_(self, parameter: nn.Parameter, amount: Tensor) -> None:
        """Add ``amount`` to the data of ``parameter``, in place."""
        old = parameter.data.clone()

        def restore() -> None:
            parameter.data.copy_(old)

        self._undo.append(restore)
        parameter.data.add_(amount.to(parameter.dtype))

    def cut_(self, module: nn.Module, outputs: Tensor, inputs: Tensor) -> None:
        """Cut the outputs and inputs of one layer where the bool masks (``[out]``, ``[in]``) are true.

        For a layer that works channel by channel the two masks are one and the same.

        Raises:
            ValueError: the layer cannot be cut, or the masks cut a block of a block-sparse layer in two.
        """
        if reason := cannot_cut(module):
            raise ValueError(f"expected a layer that can be cut, got {module}: {reason}")
        self._note_original(module)
        if isinstance(module, BlockSparseLayer):
            self._cut_blocks(module, outputs, inputs)
        elif is_channelwise(module):
            self._cut_channels(module, ~(outputs | inputs))
        else:
            self._cut_dense(module, ~outputs, ~inputs)

    def _note_original(self, module: nn.Module) -> None:
        shape = layer_shape(module)
        if shape is not None and original_widths(module) is None:
            self._undo.append(lambda: note_original_widths_(module, None))
            note_original_widths_(module, (shape.out, shape.in_))

    def _cut_blocks(self, layer: BlockSparseLayer, outputs: Tensor, inputs: Tensor) -> None:
        layout = layer.layout
        bo, bi = layout.block
        rows, columns = block_mask(outputs, bo), block_mask(inputs, bi)
        snapshot = layout.snapshot()
        self._undo.append(lambda: layout.rollback_(snapshot))
        old_slot = layout.drop_(rows, columns)
        self.map_(layer.values, lambda by_slot: gather_slots(by_slot, old_slot))
        if bool(outputs.any()):
            keep = (~outputs).nonzero().squeeze(1).to(layer.values.device)
            self.map_(layer.bias, lambda bias: bias.index_select(0, keep))
        plain = getattr(layer, "_plain", None)
        if plain is not None:
            widths = {"in_channels": layout.in_features, "out_channels": layout.out_features}
            self.set_(layer, "_plain", {**plain, **widths})
        if layer.tap is not None:
            tap = layer.tap
            self._undo.append(lambda: setattr(layer, "tap", tap))
            layer.renew_tap_()

    def _cut_channels(self, module: Any, kept: Tensor) -> None:
        parameters = [module._parameters.get("weight"), module._parameters.get("bias")]
        device = next((p.device for p in parameters if p is not None), torch.device("cpu"))
        keep = kept.nonzero().squeeze(1).to(device)
        count = int(keep.numel())
        if isinstance(module, nn.PReLU):
            if module.num_parameters == 1:
                return
            self.set_(module, "num_parameters", count)
        elif isinstance(module, _CHANNEL_NORMS):
            self.set_(module, "num_features", count)
            for name in ("running_mean", "running_var"):
                if getattr(module, name) is not None:
                    old = getattr(module, name)
                    self.set_(module, name, old.index_select(0, keep.to(old.device)))
        else:
            for name in ("in_channels", "out_channels", "groups"):
                self.set_(module, name, count)
        for parameter in parameters:
            self.map_(parameter, lambda data: data.index_select(0, keep))

    def _cut_dense(self, module: Any, kept_outputs: Tensor, kept_inputs: Tensor) -> None:
        device = module.weight.device
        rows, columns = (kept.nonzero().squeeze(1).to(device) for kept in (kept_outputs, kept_inputs))
        what = "features" if isinstance(module, nn.Linear) else "channels"
        self.set_(module, f"out_{what}", int(rows.numel()))
        self.set_(module, f"in_{what}", int(columns.numel()))
        self.map_(module.weight, lambda weight: _in_format(weight, rows, columns))
        if rows.numel() < kept_outputs.numel():
            self.map_(module.bias, lambda bias: bias.index_select(0, rows))


def _in_format(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """These rows and columns, channels-last where ``weight`` is: convolutions choose their kernels by it."""
    cut = weight.index_select(0, rows).index_select(1, columns)
    last = weight.dim() == 4 and suggests_channels_last(weight)
    return cut.contiguous(memory_format=torch.channels_last) if last else cut


def block_mask(elements: Tensor, block: int) -> Tensor:
    """Which blocks of an axis consist of true ``elements`` (bool ``[size]``; the last block may be ragged).

    Raises:
        ValueError: a block with true and false elements.
    """
    padding = -elements.numel() % block
    count = torch.cat([elements, elements.new_zeros(padding)]).view(-1, block).sum(1)
    size = torch.full_like(count, block)
    size[-1] -= padding
    if not bool(((count == 0) | (count == size)).all()):
        raise ValueError(f"expected whole blocks of {block} elements, got a mask that cuts one in two")
    return count == size
