"""The structure of a model as plain JSON values.

A manifest lists every layer that pruning can give another shape: block-sparse layers (widths, block, slots)
and plain ones (widths). Which blocks live is in the state dict instead (``layout.slot_of_block``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import (
    NORMS,
    ORIGINAL_KEYS,
    SHAPED_TYPES,
    LayerShape,
    layer_shape,
)
from dynaprune_kernels.geometry import MAX_BLOCK, MIN_BLOCK

FORMAT, VERSION = "dynaprune-structure", 2
_MAX_LAYERS, MAX_SIZE = 100_000, 2**31 - 1


def structure_manifest(model: nn.Module) -> dict[str, Any]:
    """The structure of ``model``: plain values, fit for JSON. Names are relative to ``model``."""
    layers = {
        name: shape.to_json() for name, module in model.named_modules() if (shape := layer_shape(module))
    }
    return {"format": FORMAT, "version": VERSION, "layers": layers}


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
    known = {"type", "out", "in", "groups", "block", "capacity", *(ORIGINAL_KEYS if version > 1 else ())}
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
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise ValueError(f"layer {name!r}: expected {key} from 1 to {MAX_SIZE}, got {str(value)[:40]!r}")
        return value

    widths = not issubclass(type_, (*NORMS, nn.PReLU))
    out, in_, groups = size("out"), size("in") if widths else 0, size("groups", 1)
    if out % groups or in_ % groups:
        raise ValueError(f"layer {name!r}: expected widths divisible by groups={groups}, got {out} and {in_}")
    first = (size(ORIGINAL_KEYS[0], out), size(ORIGINAL_KEYS[1], in_) if widths else 0)
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
