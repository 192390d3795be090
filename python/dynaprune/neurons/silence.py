"""Neurons that pass on nothing for a while, as if they were gone: what makes them is zero, and comes back.

Zero are the rows and biases of their makers. A norm behind a maker turns zeros into its bias, so what goes
along channel by channel (norms, depthwise convolutions) is zero too. What is left is ``act(0)``, for ReLU,
GELU and SiLU nothing; another constant is what a cut moves into the readers' biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynaprune.neurons.groups import NeuronGroup
from dynaprune.neurons.surgery import block_mask, is_channelwise
from dynaprune.nn import BlockSparseLayer


def silenced_outputs(model: nn.Module, groups: Iterable[NeuronGroup]) -> dict[str, Tensor]:
    """int64 outputs by layer that are zero while ``groups`` are silent; queries and keys are not among them,
    since nothing of a head is left without its values."""
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        for member in group.members:
            if member.outputs and not (member.along and not is_channelwise(model.get_submodule(member.name))):
                found.setdefault(member.name, []).append(member.index)
    return {name: torch.cat(parts) for name, parts in found.items()}


@contextmanager
def silent_outputs(model: nn.Module, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these outputs (int64, by layer) are zero; afterwards, also after an error, every bit is as it
    was. No version counter moves.

    Raises:
        ValueError: outputs that are part of a block of a block-sparse layer.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, index in outputs.items():
                for tensor, rows in _rows(model.get_submodule(name), index):
                    kept.append((tensor, rows, tensor.index_select(0, rows)))
                    tensor.index_fill_(0, rows, 0)
        yield
    finally:
        with torch.no_grad():
            for tensor, rows, values in reversed(kept):
                tensor.index_copy_(0, rows, values)


def _rows(layer: nn.Module, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of ``layer`` with the places along their first dimension that make ``outputs``."""
    if isinstance(layer, BlockSparseLayer):
        layout = layer.layout
        gone = torch.zeros(layout.out_features, dtype=torch.bool).index_fill_(0, outputs, True)
        blocks = block_mask(gone, layout.block[0]).to(layout.mask.device).unsqueeze(1)
        held = layout.slots_of(blocks & (layout.slot_of_block >= 0))
        yield layer.values.data, held.nonzero().squeeze(1)
    tensors = [
        layer._parameters.get("weight"),
        layer._parameters.get("bias"),
        layer._buffers.get("running_mean"),
    ]
    for tensor in tensors:
        if tensor is not None:
            yield tensor.data, outputs.to(tensor.device)
