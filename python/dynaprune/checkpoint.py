"""Save and load models of any pruned structure: safetensors with the structure's manifest, never a pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynaprune.manifest import METADATA_KEY, apply_structure, check_state, own_state, structure_manifest
from dynaprune.nn import BlockSparseLayer

__all__ = ["load", "save"]

FILE_NAME = "model.safetensors"
_MAX_JSON = 64 * 2**20


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write weights, buffers and structure of ``model`` into one safetensors file, all at once or not at all.

    Args:
        path: the file; in an existing directory, ``model.safetensors``.

    Returns:
        The file that was written.

    Raises:
        TypeError: not a module. ValueError: state that is no tensor, or tensors without data.
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
            free = (layer.layout.lists.block_of_slot < 0).view(-1, 1, 1)
            tensors[key] = tensors[key].masked_fill(free, 0)
    manifest = {**structure_manifest(model), "aliases": aliases}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(manifest)}
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def load(model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Give ``model`` the structure and the weights of a file written by :func:`save`, in place.

    Dense layers become block-sparse where the file's are, and the reverse; widths follow the file. Parameters
    stay the same objects, on their devices and in their dtypes.

    Args:
        model: freshly built, or of any structure pruned from the same network; or a function that builds it.
        path: the file, or the directory that holds it.

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
    manifest, state = _read(_file(path))
    aliases = manifest.pop("aliases", {})
    state.update({alias: state[key] for alias, key in _checked_aliases(aliases, state).items()})
    check_state(model, manifest, state)
    _check_ties(model, aliases)
    _check_kinds(model, state)
    model = apply_structure(model, manifest)
    model.load_state_dict(state)
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
    return _without_shared_memory(tensors), aliases


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that lie in one storage; all but the first become copies."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr() if not tensor.is_meta else 0
        result[key] = tensor.clone() if pointer and pointer in seen else tensor
        seen.add(pointer)
    return result


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            if text is None or len(text) > _MAX_JSON:
                raise ValueError(
                    f"expected a file written by dynaprune.save, got one without a manifest: {path}"
                )
            manifest = json.loads(text)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"expected a safetensors file written by dynaprune.save, got {path}: {error}"
        ) from error
    if not isinstance(manifest, dict):
        raise ValueError(f"expected a manifest with named entries, got {type(manifest).__name__}")
    return manifest, state


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
        floating = mine[key].is_floating_point() if key in mine else not key.endswith("slot_of_block")
        if value.is_floating_point() != floating:
            raise ValueError(
                f"expected {key} in {'floating point' if floating else 'integers'}, got {value.dtype}"
            )
