"""Save and load models of any pruned structure: safetensors with the structure's manifest, never a pickle."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.families.family import Family, check_families, note_families
from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.manifest import read_manifest, structure_manifest
from dynaprune.saving.reshape import METADATA_KEY, apply_structure, check_state, own_state
from dynaprune.saving.tensor_file import TensorFile, read_tensors, unique_names, write_tensors

__all__ = ["load", "save"]

FILE_NAME = "model.safetensors"
# Of the file, beside the version of the structure: 1 had no checksum.
_FILE_VERSION = 2


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write weights, buffers and structure of ``model`` into one safetensors file, all at once or not at all.

    The file is on the disk when the function returns, and carries a checksum of all its bytes. Equal models
    give equal bytes. Its mode is what the umask leaves of 0666.

    Args:
        path: the file; in an existing directory, ``model.safetensors``.

    Returns:
        The file that was written.

    Raises:
        TypeError: not a module. ValueError: state that is no tensor, or tensors without data.
        OSError: a folder that does not exist, a disk that is full or read-only; an older file stays as it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model as an nn.Module, got {type(model).__name__}")
    target = _file(path)
    tensors, aliases = _unique(model)
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"expected a model with weights, got {key} on the meta device")
    for name, layer in model.named_modules():
        if isinstance(layer, BlockSparseLayer):
            key = f"{name}.values" if name else "values"
            free = (layer.layout.block_of_slot < 0).view(-1, 1, 1)
            tensors[key] = tensors[key].masked_fill(free, 0)
    manifest = {
        **structure_manifest(model),
        "aliases": aliases,
        "file": _FILE_VERSION,
        "weights": _weight_shapes(model, structure_manifest(model)),
    }
    write_tensors(target, tensors, {METADATA_KEY: json.dumps(manifest, sort_keys=True), "format": "pt"})
    return target


def load(
    model: nn.Module | Callable[[], nn.Module],
    path: str | os.PathLike[str],
    *,
    families: Sequence[Family] = (),
) -> nn.Module:
    """Give ``model`` the structure and the weights of a file written by :func:`save`, in place.

    Dense layers become block-sparse where the file's are, and the reverse. Parameters stay the same objects,
    on their devices and in their dtypes. A warning names tensors that hold NaN, infinite parameters and
    negative variances.

    Widths follow the file where neurons were cut. Each width of the model has to be the file's, or the one
    that the file's network was built with: a head of other classes is refused. Files of version 1 of the
    structure do not say what the network was built with. They load into a model of the same or of larger
    widths; where only outputs differ, or only inputs, they are refused too.

    Args:
        model: freshly built, or of any structure pruned from the same network; or a function that builds it.
        path: the file, or the directory that holds it.
        families: those that the model was pruned with (``PruningConfig(families=...)``).

    Returns:
        The model (its successor where the model itself is a single layer that changes its kind).

    Raises:
        FileNotFoundError: no such file. TypeError: no model. ValueError: a file that is damaged, not ours, or
            of another network; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise TypeError(f"expected a model or a function that builds one, got {type(model).__name__}")
        model = model()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"expected a function that builds an nn.Module, got one that returns {type(model).__name__}"
            )
    note_families(model, check_families(families))
    manifest, state = _read(_file(path))
    aliases, weights = manifest.pop("aliases", {}), manifest.pop("weights", None)
    state.update({alias: state[key] for alias, key in _checked_aliases(aliases, state).items()})
    check_state(model, manifest, state)
    _check_ties(model, aliases)
    _check_kinds(model, state)
    if weights is not None:
        _check_weight_shapes(model, manifest, weights)
    model = apply_structure(model, manifest)
    model.load_state_dict(state)
    _warn_of_values(model, state)
    return model


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state once, and for the other names of a tied one the name it is stored by."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, value in own_state(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"expected a state of tensors, got {key} of type {type(value).__name__}")
        if id(value) in first:
            aliases[key] = first[id(value)]
        else:
            first[id(value)] = key
            tensors[key] = value.detach()
    return tensors, aliases


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        found = read_tensors(path)
        manifest = _manifest_of(found)
    except ValueError as error:
        raise ValueError(f"expected a file written by dynaprune.save, got {path}: {error}") from error
    return manifest, found.tensors


def _manifest_of(found: TensorFile) -> dict[str, Any]:
    text = found.metadata.get(METADATA_KEY)
    if text is None or not set(found.metadata) <= {METADATA_KEY, "format"}:
        raise ValueError(f"its metadata are {sorted(found.metadata)[:5]}, a manifest is missing")
    try:
        manifest = json.loads(text, object_pairs_hook=unique_names)
    except RecursionError as error:
        raise ValueError("its manifest is nested too deeply") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"expected a manifest with named entries, got {type(manifest).__name__}")
    version = manifest.pop("file", 1)
    if type(version) is not int or version not in (1, _FILE_VERSION):
        raise ValueError(f"expected a file of version 1 or {_FILE_VERSION}, got {str(version)[:40]!r}")
    if found.sealed != (version == _FILE_VERSION) or found.sealed != ("weights" in manifest):
        raise ValueError("its manifest and its checksum are of different versions of the format")
    return manifest


def _weight_shapes(model: nn.Module, manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shape that each layer's weight has, or would have if the layer were dense."""
    shapes = {}
    for name, shape in read_manifest(manifest).items():
        kernel = getattr(model.get_submodule(name), "kernel_size", ())
        shapes[name] = [shape.out, shape.in_ // shape.groups, *kernel] if shape.in_ else [shape.out]
    return shapes


def _check_weight_shapes(model: nn.Module, manifest: Mapping[str, Any], weights: Any) -> None:
    """Widths inside a ragged block show in no tensor's shape, kernels of equal size in none either."""
    expected = _weight_shapes(model, manifest)
    if json.dumps(weights, sort_keys=True) != json.dumps(expected, sort_keys=True):  # True is not 1 there
        raise ValueError(
            "expected weights of the shapes that the structure and this model give, "
            f"{str(expected)[:200]}, got {str(weights)[:200]}"
        )


def _checked_aliases(aliases: Any, state: dict[str, Tensor]) -> dict[str, str]:
    if not isinstance(aliases, dict) or not all(
        isinstance(key, str) and key in state and alias not in state for alias, key in aliases.items()
    ):
        raise ValueError(f"expected aliases of tensors in the file, got {str(aliases)[:80]}")
    return aliases


def _check_ties(model: nn.Module, aliases: dict[str, str]) -> None:
    """What is one tensor in the file must be one in the model, and the reverse."""
    first: dict[int, str] = {}
    mine = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(value), key) != key:
            mine[key] = first[id(value)]
    if mine != aliases:
        raise ValueError(f"expected the tied weights {sorted(mine.items())}, got {sorted(aliases.items())}")


def _check_kinds(model: nn.Module, state: dict[str, Tensor]) -> None:
    mine = model.state_dict(keep_vars=True)
    for key, value in state.items():
        wanted = _kind(mine[key]) if isinstance(mine.get(key), Tensor) else None
        if wanted is None:
            wanted = "integers" if key.endswith("slot_of_block") else "floating point"
        if _kind(value) != wanted:
            raise ValueError(f"expected {key} in {wanted}, got {value.dtype}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating point"
    if tensor.is_complex():
        return "complex numbers"
    return "truth values" if tensor.dtype == torch.bool else "integers"


def _warn_of_values(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, list[str]] = {}
    for key, value in state.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        if bool(value.isnan().any()):
            found.setdefault("NaN in", []).append(key)
        elif key in parameters and bool(value.isinf().any()):
            found.setdefault("infinite values in", []).append(key)
        if key.rpartition(".")[2] == "running_var" and bool((value < 0).any()):
            found.setdefault("negative variances in", []).append(key)
    for what, keys in found.items():
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        warnings.warn(f"loaded a model with {what} {', '.join(keys[:5])}{more}", stacklevel=3)
