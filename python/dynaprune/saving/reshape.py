"""Making a model have the structure of a manifest.

:func:`add_structure_hooks` makes a model's ``state_dict()`` carry its manifest (in the metadata that PyTorch
keeps with a state dict), and ``load_state_dict`` resize the model to the manifest before it copies anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.families.family import counts_in
from dynaprune.nn import BlockSparseConv2d, BlockSparseLayer, BlockSparseLinear
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune.nn.shape import CONVOLUTIONS, SHAPED_TYPES, LayerShape, layer_shape, note_original_widths_
from dynaprune.nn.swap import SPARSE_TYPES
from dynaprune.saving.manifest import MAX_SIZE, read_manifest, structure_manifest
from dynaprune.saving.other_widths import refuse_other_widths
from dynaprune_kernels import BlockLayout
from dynaprune_kernels.geometry import conv_grid, linear_grid

METADATA_KEY = "dynaprune"
CARRIED_PREFIX = "_dynaprune."


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
    if rows * columns > MAX_SIZE or shape.capacity > rows * columns:
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
    counts = counts_in(model)
    for name, shape in read_manifest(manifest).items():
        module = model.get_submodule(name)
        before = layer_shape(module)
        assert before is not None
        original = shape.original or before.original
        if before != shape:
            _reshape_(module, shape)
        note_original_widths_(module, None if original == (shape.out, shape.in_) else original)
    for each in counts:
        each.set_counts(model)
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
        module.renew_tap_()
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = shape.in_, shape.out
    elif isinstance(module, CONVOLUTIONS):
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
