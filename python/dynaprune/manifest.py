"""The structure of a model as plain JSON values, and making a model have it.

A manifest lists every layer that pruning can give another shape: block-sparse layers (widths, block, slots)
and plain ones (widths). Which blocks live is in the state dict instead (``layout.slot_of_block``).

``add_structure_hooks`` makes a model's ``state_dict()`` carry its manifest (in the metadata that PyTorch
keeps with a state dict), and ``load_state_dict`` resize the model to the manifest before it copies anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune.nn.swap import SPARSE_TYPES
from dynaprune.original_widths import note_original_widths_, original_widths, refuse_other_widths
from dynaprune.pruning.attention_heads import find_attentions
from dynaprune_kernels import BlockLayout
from dynaprune_kernels.geometry import MAX_BLOCK, MIN_BLOCK, conv_grid, linear_grid

FORMAT, VERSION = "dynaprune-structure", 2
METADATA_KEY = "dynaprune"
CARRIED_PREFIX = "_dynaprune."
_ORIGINALS = ("original_out", "original_in")
_MAX_LAYERS, _MAX_SIZE = 100_000, 2**31 - 1

_SPARSE = (BlockSparseLinear, BlockSparseConv2d, BlockSparseConv1d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
SHAPED_TYPES: dict[str, type[nn.Module]] = {
    t.__name__: t for t in (*_SPARSE, nn.Linear, *_CONVOLUTIONS, *_NORMS, nn.PReLU)
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
        for key, width, before in zip(_ORIGINALS, (self.out, self.in_), original, strict=True):
            if width != before:
                entry[key] = before
        return entry


def structure_manifest(model: nn.Module) -> dict[str, Any]:
    """The structure of ``model``: plain values, fit for JSON. Names are relative to ``model``."""
    layers = {
        name: shape.to_json() for name, module in model.named_modules() if (shape := layer_shape(module))
    }
    return {"format": FORMAT, "version": VERSION, "layers": layers}


def layer_shape(module: Any) -> LayerShape | None:
    """The shape of one layer, None for modules that pruning never reshapes."""
    type_ = type(module)
    kind = type_.__name__
    if SHAPED_TYPES.get(kind) is not type_:
        return None
    if issubclass(type_, BlockSparseLayer):
        layout = module.layout
        groups = layout.conv.groups if layout.conv else 1
        shape = LayerShape(
            kind, layout.out_features, layout.in_features, groups, layout.block, layout.capacity
        )
    elif kind == "Linear":
        shape = LayerShape(kind, module.out_features, module.in_features)
    elif issubclass(type_, _CONVOLUTIONS):
        shape = LayerShape(kind, module.out_channels, module.in_channels, module.groups)
    else:
        shape = LayerShape(kind, module.num_parameters if kind == "PReLU" else module.num_features)
    return replace(shape, original=original_widths(module) or (shape.out, shape.in_))


def read_manifest(manifest: Any) -> dict[str, LayerShape]:
    """The layers of a manifest from outside, every value checked. One of version 1 says no original widths.

    Raises:
        ValueError: not a manifest, of a later version, or with values that no layer can have.
    """
    if not isinstance(manifest, Mapping) or manifest.get("format") != FORMAT:
        raise ValueError(f"expected a structure manifest of format {FORMAT!r}, got {str(manifest)[:80]}")
    version = manifest.get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise ValueError(f"expected a manifest of version 1 or {VERSION}, got {str(version)[:40]!r}")
    layers = manifest.get("layers")
    if not isinstance(layers, Mapping) or len(layers) > _MAX_LAYERS:
        raise ValueError(f"expected at most {_MAX_LAYERS} layers by name, got {type(layers).__name__}")
    return {name: _read_layer(name, entry, version) for name, entry in layers.items()}


def _read_layer(name: Any, entry: Any, version: int) -> LayerShape:
    if not isinstance(name, str) or len(name) > 1000 or not isinstance(entry, Mapping):
        raise ValueError(f"expected a layer's name and its shape, got {str(name)[:80]!r}: {str(entry)[:80]}")
    known = {"type", "out", "in", "groups", "block", "capacity", *(_ORIGINALS if version > 1 else ())}
    if not set(entry) <= known:
        raise ValueError(
            f"layer {name!r}: expected the keys {sorted(known)}, got {sorted(map(str, entry))[:20]}"
        )
    kind = str(entry.get("type"))
    type_ = SHAPED_TYPES.get(kind)
    if type_ is None:
        raise ValueError(
            f"layer {name!r}: expected a type among {', '.join(SHAPED_TYPES)}, got {kind[:80]!r}"
        )

    def size(key: str, default: int | None = None) -> int:
        value = entry.get(key, default)
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise ValueError(f"layer {name!r}: expected {key} from 1 to {_MAX_SIZE}, got {str(value)[:40]!r}")
        return value

    widths = not issubclass(type_, (*_NORMS, nn.PReLU))
    out, in_, groups = size("out"), size("in") if widths else 0, size("groups", 1)
    if out % groups or in_ % groups:
        raise ValueError(f"layer {name!r}: expected widths divisible by groups={groups}, got {out} and {in_}")
    first = (size(_ORIGINALS[0], out), size(_ORIGINALS[1], in_) if widths else 0)
    original = first if version > 1 else None
    if first[0] < out or first[1] < in_:
        raise ValueError(
            f"layer {name!r}: expected original widths from {out} and {in_} up, got {first[0]} and {first[1]}"
        )
    if not issubclass(type_, BlockSparseLayer):
        return LayerShape(kind, out, in_, groups, original=original)
    block = entry.get("block")
    if not (
        isinstance(block, (list, tuple))
        and len(block) == 2
        and all(type(b) is int and MIN_BLOCK <= b <= MAX_BLOCK for b in block)
    ):
        raise ValueError(
            f"layer {name!r}: expected two block sizes from {MIN_BLOCK} to {MAX_BLOCK}, got {block!r}"
        )
    return LayerShape(kind, out, in_, groups, (block[0], block[1]), size("capacity"), original)


def own_state(model: nn.Module) -> dict[str, Any]:
    """The model's state dict (Parameters, not copies) without what ``carry_structure`` adds to it."""
    guards = {f"{_prefix(n)}weight" for n, m in model.named_modules() if isinstance(m, BlockSparseLayer)}
    states = model.state_dict(keep_vars=True)
    return {k: v for k, v in states.items() if k not in guards and not k.startswith(CARRIED_PREFIX)}


def expected_shapes(model: nn.Module, manifest: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of ``model.state_dict()`` once the model has the structure of ``manifest``.

    Raises:
        ValueError: a manifest that is wrong in itself, or of another model: layers of other names or kinds,
            or of other widths (see :func:`refuse_other_widths`).
    """
    wanted = read_manifest(manifest)
    found = {name: shape for name, module in model.named_modules() if (shape := layer_shape(module))}
    mine = {name: model.get_submodule(name) for name in found}
    missing, foreign = sorted(set(mine) - set(wanted)), sorted(set(wanted) - set(mine))
    if missing or foreign:
        raise ValueError(
            f"expected the structure of this model, got another's: without layers {missing[:5]}, "
            f"with unknown layers {foreign[:5]}"
        )
    refuse_other_widths((name, found[name], wanted[name]) for name in found)
    shapes: dict[str, tuple[int, ...]] = {}
    changed = {name for name in found if found[name] != wanted[name]}
    prefixes = tuple(_prefix(name) for name in changed)
    for key, tensor in own_state(model).items():
        if isinstance(tensor, Tensor) and not (prefixes and _owned(key, prefixes)):
            shapes[key] = tuple(tensor.shape)
    for name in changed:
        for key, size in _tensor_shapes(name, mine[name], wanted[name]).items():
            shapes[_prefix(name) + key] = size
    return shapes


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _owned(key: str, prefixes: tuple[str, ...]) -> bool:
    return key.startswith(prefixes)


def _tensor_shapes(name: str, module: Any, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer of the model once it has ``shape``."""
    type_ = SHAPED_TYPES[shape.type]
    same_kind = SPARSE_TYPES.get(type(module)) is type_ or SPARSE_TYPES.get(type_) is type(module)
    if type_ is not type(module) and not same_kind:
        raise ValueError(f"layer {name!r}: expected a {type(module).__name__} or its like, got {shape.type}")
    before = layer_shape(module)
    assert before is not None
    depthwise = before.groups > 1 and before.groups == before.in_ == before.out
    if shape.groups != before.groups and not (depthwise and shape.groups == shape.in_ == shape.out):
        raise ValueError(f"layer {name!r}: expected groups={before.groups}, got {shape.groups}")
    if not shape.in_:
        present = {key: t for key, t in module.state_dict().items() if isinstance(t, Tensor)}
        return {key: (shape.out,) if t.dim() else () for key, t in present.items()}
    tensors: dict[str, tuple[int, ...]] = {}
    if module.bias is not None:
        tensors["bias"] = (shape.out,)
    inputs = shape.in_ // shape.groups
    kernel = () if isinstance(module, (nn.Linear, BlockSparseLinear)) else tuple(module.kernel_size)
    if not issubclass(type_, BlockSparseLayer):
        return {**tensors, "weight": (shape.out, inputs, *kernel)}
    assert shape.block is not None
    if kernel:
        geometry = _geometry(module)._replace(groups=shape.groups)
        rows, columns = conv_grid(shape.out, shape.in_, shape.block, geometry)
    else:
        rows, columns = linear_grid(shape.out, shape.in_, shape.block)
    if rows * columns > _MAX_SIZE or shape.capacity > rows * columns:
        raise ValueError(
            f"layer {name!r}: expected a capacity up to its {rows * columns} blocks, got {shape.capacity}"
        )
    bo, bi = shape.block
    return {**tensors, "values": (shape.capacity, bi, bo), "layout.slot_of_block": (rows, columns)}


def _geometry(module: Any) -> Any:
    if isinstance(module, BlockSparseLayer):
        return module.layout.conv
    sparse: Any = SPARSE_TYPES[type(module)]
    return sparse.settings_of(module)[0]


def check_state(model: nn.Module, manifest: Any, state: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a state dict that does not fit ``model`` once it has the structure of ``manifest``.

    Raises:
        ValueError: missing, unknown or wrongly shaped tensors; slots that are used twice or do not exist.
    """
    shapes = {prefix + key: shape for key, shape in expected_shapes(model, manifest).items()}
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and k.startswith(prefix)}
    missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"expected the tensors of this model, got none for {missing[:5]} and unknown {unknown[:5]}"
        )
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"expected {key} of shape {shape}, got {tuple(tensors[key].shape)}")
    for name, layer in read_manifest(manifest).items():
        if layer.block is not None:
            _check_slots(name, tensors[f"{prefix}{_prefix(name)}layout.slot_of_block"], layer.capacity)


def _check_slots(name: str, slots: Tensor, capacity: int) -> None:
    if slots.dtype != torch.int32:
        raise ValueError(f"layer {name!r}: expected int32 slots, got {slots.dtype}")
    used = slots[slots >= 0]
    if used.numel() and (int(used.max()) >= capacity or used.unique().numel() != used.numel()):
        raise ValueError(
            f"layer {name!r}: expected each slot once and below the capacity {capacity}, got others"
        )
    if bool((slots < -1).any()):
        raise ValueError(f"layer {name!r}: expected slots from -1 up, got {int(slots.min())}")


def apply_structure(model: nn.Module, manifest: Any) -> nn.Module:
    """Give ``model`` the structure of ``manifest``, in place, for a state dict that is loaded next.

    Layers that have it already keep everything. The others keep their Parameter objects, but these hold zeros
    (and no gradient) until the state dict is loaded; optimizer state that they had has to be loaded too.

    Returns:
        The model.

    Raises:
        ValueError: see :func:`expected_shapes`; the model is then as it was.
    """
    expected_shapes(model, manifest)
    attentions = find_attentions(model)
    for name, shape in read_manifest(manifest).items():
        module = model.get_submodule(name)
        before = layer_shape(module)
        assert before is not None
        original = shape.original or before.original
        if before != shape:
            _reshape_(module, shape)
        note_original_widths_(module, None if original == (shape.out, shape.in_) else original)
    for attention in attentions:
        attention.set_counts(model)
    return model


def _reshape_(module: Any, shape: LayerShape) -> None:
    type_ = SHAPED_TYPES[shape.type]
    shapes = _tensor_shapes("", module, shape)
    if type_ is not type(module):
        _change_kind_(module, shape)
    for key, size in shapes.items():
        tensor = getattr(module, key, None)
        if isinstance(tensor, nn.Parameter) and tuple(tensor.shape) != size:
            replace_parameter_data_(tensor, tensor.new_zeros(size))
        elif isinstance(tensor, Tensor) and tuple(tensor.shape) != size:
            setattr(module, key, tensor.new_zeros(size))
    if isinstance(module, BlockSparseLayer):
        assert shape.block is not None
        conv = module.layout.conv
        module.layout = _empty_layout(
            shape, conv._replace(groups=shape.groups) if conv else None, module.values.device
        )
        if isinstance(module, BlockSparseConv2d):
            widths = {"in_channels": shape.in_, "out_channels": shape.out, "groups": shape.groups}
            module._plain = {**module._plain, **widths}
        if module.tap is not None:
            module.enable_tap_()
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = shape.in_, shape.out
    elif isinstance(module, _CONVOLUTIONS):
        module.in_channels, module.out_channels, module.groups = shape.in_, shape.out, shape.groups
    else:
        setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", shape.out)


def _empty_layout(shape: LayerShape, conv: Any, device: torch.device) -> BlockLayout:
    assert shape.block is not None
    grid = (
        conv_grid(shape.out, shape.in_, shape.block, conv)
        if conv
        else linear_grid(shape.out, shape.in_, shape.block)
    )
    dead = torch.zeros(grid, dtype=torch.bool, device=device)
    return BlockLayout(
        shape.out, shape.in_, shape.block, conv=conv, mask=dead, capacity=shape.capacity, device=device
    )


def _change_kind_(module: Any, shape: LayerShape) -> None:
    """Make a plain layer block-sparse, or the reverse: the same object, around the same Parameters."""
    if isinstance(module, BlockSparseLayer):
        module.to_dense()
        return
    sparse: Any = SPARSE_TYPES[type(module)]
    if sparse is BlockSparseLinear:
        layout = _empty_layout(shape, None, module.weight.device)
    else:
        geometry, _ = sparse.settings_of(module)
        layout = _empty_layout(shape, geometry._replace(groups=shape.groups), module.weight.device)
    sparse.in_place_of(module, layout)


def add_structure_hooks(model: nn.Module) -> list[Any]:
    """Let ``state_dict()`` carry the manifest, ``load_state_dict`` follow it.

    Returns:
        Handles to remove; none where the model has the hooks already.
    """
    if _write_manifest in model._state_dict_hooks.values():
        return []
    return [
        model.register_state_dict_post_hook(_write_manifest),
        model.register_load_state_dict_pre_hook(_follow_manifest),
    ]


def _write_manifest(module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    local_metadata[METADATA_KEY] = structure_manifest(module)


def _follow_manifest(
    module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    manifest = local_metadata.get(METADATA_KEY)
    if manifest is None or manifest == structure_manifest(module):
        return
    check_state(module, manifest, state, prefix)
    apply_structure(module, manifest)
