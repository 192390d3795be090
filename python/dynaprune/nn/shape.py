"""The widths of layers that pruning can give another shape, now and before anything was cut out of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn.block_sparse import BlockSparseLayer
from dynaprune.nn.conv import BlockSparseConv1d, BlockSparseConv2d
from dynaprune.nn.linear import BlockSparseLinear
from dynaprune_kernels import BlockLayout

ORIGINAL_KEYS = ("original_out", "original_in")
_SPARSE = (BlockSparseLinear, BlockSparseConv2d, BlockSparseConv1d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
SHAPED_TYPES: dict[str, type[nn.Module]] = {
    t.__name__: t for t in (*_SPARSE, nn.Linear, *CONVOLUTIONS, *NORMS, nn.PReLU)
}


@dataclass(frozen=True)
class LayerShape:
    """One layer of a manifest.

    Args:
        type: class name. out, in_: widths; norms and PReLU have ``out`` only.
        groups: of a convolution.
        block, capacity: ``(bo, bi)`` and slots of a block-sparse layer.
        original: out and in before anything was cut; None where it is not known (manifests of version 1).
    """

    type: str
    out: int
    in_: int = 0
    groups: int = 1
    block: tuple[int, int] | None = None
    capacity: int = 0
    original: tuple[int, int] | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what does not apply is left out."""
        entry: dict[str, Any] = {"type": self.type, "out": self.out}
        if self.in_:
            entry["in"] = self.in_
        if self.groups > 1:
            entry["groups"] = self.groups
        if self.block is not None:
            entry.update(block=list(self.block), capacity=self.capacity)
        original = self.original or (self.out, self.in_)
        for key, width, before in zip(ORIGINAL_KEYS, (self.out, self.in_), original, strict=True):
            if width != before:
                entry[key] = before
        return entry


def layer_shape(module: Any) -> LayerShape | None:
    """The shape of one layer, None for modules that pruning never reshapes."""
    type_ = type(module)
    kind = type_.__name__
    if SHAPED_TYPES.get(kind) is not type_:
        return None
    if issubclass(type_, BlockSparseLayer):
        layout = module.layout
        groups = layout.groups
        shape = LayerShape(
            kind, layout.out_features, layout.in_features, groups, layout.block, layout.capacity
        )
    elif kind == "Linear":
        shape = LayerShape(kind, module.out_features, module.in_features)
    elif issubclass(type_, CONVOLUTIONS):
        shape = LayerShape(kind, module.out_channels, module.in_channels, module.groups)
    else:
        shape = LayerShape(kind, module.num_parameters if kind == "PReLU" else module.num_features)
    return replace(shape, original=original_widths(module) or (shape.out, shape.in_))


ATTRIBUTE = "_original_widths"


def original_widths(module: nn.Module) -> tuple[int, int] | None:
    """Outputs and inputs (0 for norms) of ``module`` before its first cut; None where nothing was cut."""
    return vars(module).get(ATTRIBUTE)


def note_original_widths_(module: Any, widths: tuple[int, int] | None) -> None:
    """Let ``module`` say that it had these widths; None: that it has them still."""
    vars(module).pop(ATTRIBUTE, None)
    if widths is not None:
        setattr(module, ATTRIBUTE, widths)


def block_weights(layer: BlockSparseLayer) -> Tensor:
    """Number of weights that each block holds inside the dense weight: float64 ``[rows, columns]``."""
    return layout_weights(layer.layout)


def layout_weights(layout: BlockLayout) -> Tensor:
    """:func:`block_weights` of a layout."""
    device = layout.mask.device
    return _row_heights(layout, device).unsqueeze(1) * _column_widths(layout, device)


def live_fan_in(layout: BlockLayout) -> Tensor:
    """Live weights of each output of a block row: float64 ``[rows]``."""
    return (_column_widths(layout, layout.mask.device) * layout.mask).sum(1)


def _row_heights(layout: BlockLayout, device: torch.device) -> Tensor:
    rows = torch.full((layout.rows,), layout.block.outputs, dtype=torch.float64, device=device)
    rows[-1] = layout.out_features - (layout.rows - 1) * layout.block.outputs
    return rows


def _column_widths(layout: BlockLayout, device: torch.device) -> Tensor:
    inputs, channel_blocks = layout.in_features // layout.groups, layout.columns // layout.taps
    columns = torch.full((channel_blocks,), layout.block.inputs, dtype=torch.float64, device=device)
    columns[-1] = inputs - (channel_blocks - 1) * layout.block.inputs
    return columns.repeat(layout.taps)
