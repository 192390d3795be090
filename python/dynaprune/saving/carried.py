"""A model's state dict that carries its structure, and more, as tensors of its own.

Formats that keep nothing but tensors by name (safetensors, as the Trainer and accelerate write it) drop the
metadata in which a state dict's manifest travels (``dynaprune.saving.reshape``). Here the manifest is one
more tensor, ``_dynaprune.structure``: uint8, the bytes of its JSON. Loading takes it out again and gives the
model that structure before anything is copied. Where a layer is block-sparse, an empty tensor lies in the
place of its dense weight: code that knows nothing of all this stops at a wrong size and leaves no layer
random.
A checksum of all that is carried, and of each layer's slots, is verified at loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.checksum import checksum_of, verify
from dynaprune.saving.manifest import structure_manifest
from dynaprune.saving.reshape import CARRIED_PREFIX, apply_structure, expected_shapes

_STRUCTURE = f"{CARRIED_PREFIX}structure"
_STATE = f"{CARRIED_PREFIX}state"
_CHECKSUM = f"{CARRIED_PREFIX}checksum"
_KNOWN = re.compile(rf"{re.escape(CARRIED_PREFIX)}(structure|checksum|state(\.\d+)?)")
_TENSOR = "tensor:"
_FLOATS = {
    "float64": (torch.float64, torch.int64),
    "float32": (torch.float32, torch.int32),
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
}

_HANDLES: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def carry_structure(
    model: nn.Module,
    *,
    state: Callable[[], Mapping[str, Any] | None] | None = None,
    loaded: Callable[[dict[str, Any] | None], None] | None = None,
    plain: Mapping[str, Any] | None = None,
) -> None:
    """Let ``model.state_dict()`` carry the model's structure as a tensor, and ``load_state_dict`` follow it.

    A second call takes the place of the first.

    Args:
        state: what to carry besides: nested dicts (string keys) and lists of tensors and plain values, or
            None. Deep copies of the model carry the structure only.
        loaded: called with what ``state`` had returned when the state dict was made, None where it carries
            nothing.
        plain: manifest of the structure that needs no mention, since the model's own code builds it.
    """
    for handle in _HANDLES.pop(model, []):
        handle.remove()
    itself = ref(model)

    def write(module: nn.Module, states: dict[str, Any], prefix: str, _: Any) -> None:
        manifest = structure_manifest(module)
        if manifest != plain:
            states[prefix + _STRUCTURE] = _bytes(manifest)
            states.update({prefix + key: torch.empty(0) for key in guarded_weights(module)})
        more = state() if state is not None and module is itself() else None
        if more is not None:
            states.update({prefix + key: tensor for key, tensor in to_tensors(more).items()})
        start = prefix + CARRIED_PREFIX
        carried = {key[len(prefix) :]: states[key] for key in states if key.startswith(start)}
        if carried:
            slots = slot_checksums(module, states, prefix)
            states[prefix + _CHECKSUM] = _bytes({"carried": checksum_of([carried, slots]), "slots": slots})

    def read(module: nn.Module, states: dict[str, Any], prefix: str, *_: Any) -> None:
        start = prefix + CARRIED_PREFIX
        carried = {key[len(prefix) :]: states.pop(key) for key in list(states) if key.startswith(start)}
        _verify(carried, states, prefix)
        if _STRUCTURE in carried:
            _follow(module, _parsed(carried.pop(_STRUCTURE)), states, prefix)
            for key in guarded_weights(module):
                states.pop(prefix + key, None)
        else:
            _refuse_dense(module, states, prefix)
        if loaded is not None and module is itself():
            loaded(from_tensors(carried))

    reader = model.register_load_state_dict_pre_hook(read)
    # Before hooks that check the state dict as it should be without what is carried.
    hooks: Any = model._load_state_dict_pre_hooks
    hooks.move_to_end(reader.id, last=False)
    _HANDLES[model] = [model.register_state_dict_post_hook(write), reader]


def slot_checksums(module: nn.Module, states: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The checksum of each block-sparse layer's slots in a state dict, by the tensor's name in the module."""
    names = [name.removesuffix("weight") + "layout.slot_of_block" for name in guarded_weights(module)]
    return {name: checksum_of(states[prefix + name]) for name in names if prefix + name in states}


def _verify(carried: dict[str, Any], states: Mapping[str, Any], prefix: str) -> None:
    """Refuse what is not as it was written. Checkpoints from before there were checksums pass."""
    if unknown := [key for key in carried if not _KNOWN.fullmatch(key)]:
        raise ValueError(
            f"expected a structure and a state of dynaprune in the checkpoint, got {unknown[:5]}"
        )
    if _CHECKSUM not in carried:
        return
    stated = _parsed(carried.pop(_CHECKSUM))
    if not (isinstance(stated, dict) and isinstance(stated.get("slots"), dict)):
        raise ValueError(f"expected checksums in the checkpoint, got {str(stated)[:80]}")
    verify(
        [carried, stated["slots"]],
        stated.get("carried", ""),
        "the structure or the pruner's state in the checkpoint",
    )
    for name, checksum in stated["slots"].items():
        if prefix + name in states:  # tied layers are saved once
            verify(states[prefix + name], checksum, f"{prefix}{name}")


def guarded_weights(model: nn.Module) -> list[str]:
    """Names under which the block-sparse layers' dense weights would be stored."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, BlockSparseLayer)]
    return [f"{name}.weight" if name else "weight" for name in layers]


def to_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Nested dicts and lists of tensors and plain values as tensors by name, without a pickle.

    None of them is in floating point: floats are kept as the integers of their bits.

    Raises:
        TypeError: a value that JSON has no form for, or a key that is no string.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            bits, kind = value.detach().contiguous(), str(value.dtype).removeprefix("torch.")
            if kind in _FLOATS:  # averages of a state dict's floats must not reach it
                bits, kind = bits.view(_FLOATS[kind][1]), f":{kind}"
            else:
                kind = ""
            tensors[f"{_STATE}.{len(tensors)}"] = bits
            return f"{_TENSOR}{len(tensors) - 1}{kind}"
        if isinstance(value, Mapping):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise TypeError(f"expected names as keys, got {wrong[0]!r}")
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, str):
            return f"text:{value}"
        return value

    skeleton = plain(state)
    return {_STATE: _bytes(skeleton), **tensors}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What :func:`to_tensors` was given (tuples as lists), None where there is nothing.

    Raises:
        ValueError: not what it writes.
    """
    if _STATE not in tensors:
        return None

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: full(item) for key, item in value.items()}
        if isinstance(value, list):
            return [full(item) for item in value]
        if not isinstance(value, str):
            return value
        kind, _, rest = value.partition(":")
        if kind == "text":
            return rest
        number, _, floating = rest.partition(":")
        tensor = tensors.get(f"{_STATE}.{number}")
        if tensor is None:
            raise ValueError(f"expected a tensor {_STATE}.{number} in the checkpoint, got none")
        if not floating:
            return tensor
        dtype, bits = _FLOATS.get(floating, (None, None))
        if dtype is None or tensor.dtype != bits:
            raise ValueError(f"expected the bits of {floating[:20]} in {_STATE}.{number}, got {tensor.dtype}")
        return tensor.view(dtype)

    return full(_parsed(tensors[_STATE]))


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _parsed(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ValueError(f"expected JSON as a uint8 tensor [bytes], got {str(tensor)[:80]}")
    try:
        return json.loads(tensor.cpu().numpy().tobytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"expected JSON in the checkpoint's structure or state, got {error}") from error


def _follow(module: nn.Module, manifest: Any, states: Mapping[str, Any], prefix: str) -> None:
    """Give the module the structure, unless tensors of the state dict deny it.

    Some may be missing: tied weights are saved once.
    """
    for key, shape in expected_shapes(module, manifest).items():
        tensor = states.get(prefix + key)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"expected {prefix}{key} of shape {shape}, got {tuple(tensor.shape)}")
    if manifest != structure_manifest(module) and apply_structure(module, manifest) is not module:
        raise ValueError("expected a model whose block-sparse layers are parts of it, got a single layer")


def _refuse_dense(module: nn.Module, states: Mapping[str, Any], prefix: str) -> None:
    for key in guarded_weights(module):
        if prefix + key in states:
            raise ValueError(
                f"expected a checkpoint with block-sparse layers, got one with a dense {key}: load it into "
                "the model before its layers are swapped"
            )
