"""The blocks of a trained network that a sparse start has left out, in the file that they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.checksum import checksum_of, verify
from dynaprune.saving.tensor_file import unique_names

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredWeight:
    """A dense weight in a safetensors file, with the checksum that it had."""

    file: Path
    key: str
    checksum: str

    def read(self) -> Tensor:
        """The weight; ValueError where it is not what it was."""
        tensor = _open(self.file).get_tensor(self.key)
        verify(tensor, self.checksum, f"{self.key} in {self.file}")
        return tensor


@dataclass(frozen=True)
class PretrainedBlocks:
    """Where the dense weights of layers are, by layer. Nothing of them is kept in memory."""

    weights: Mapping[str, StoredWeight]

    @classmethod
    def of(cls, layers: Mapping[str, BlockSparseLayer], checkpoint: Path) -> PretrainedBlocks:
        """Find the weights of ``layers``, which have all their blocks, in a file or folder.

        Names may lack, or have in front, the name of a part of the model (``bert.``). A layer that is not
        there is a new one, as a pooler or a head is.

        Raises:
            ValueError: no layer is there, or one has another weight than there.
        """
        keys = _keys(checkpoint)
        matches = {name: _match(f"{name}.weight", keys, checkpoint) for name in layers}
        if not any(matches.values()):
            raise ValueError(f"expected {next(iter(layers))}.weight in {checkpoint}, got no such tensor")
        found = {}
        for name, layer in layers.items():
            if (key := matches[name]) is None:
                continue
            tensor = _open(keys[key]).get_tensor(key)
            mine = layer.to_dense_shape(layer.values).cpu()
            if tensor.shape != mine.shape or not torch.equal(tensor.to(mine.dtype), mine):
                raise ValueError(
                    f"expected {key} in {keys[key]} to be the weight of {name}, {tuple(mine.shape)}, got "
                    f"another one of shape {tuple(tensor.shape)}"
                )
            found[name] = StoredWeight(keys[key], key, checksum_of(tensor))
        return cls(found)

    def values(self, name: str, layer: BlockSparseLayer, numbers: Tensor) -> Tensor:
        """Blocks of a layer by their numbers in the whole weight: ``[n, bi, bo]`` on the host."""
        return layer.to_blocks(self.weights[name].read())[numbers.cpu()]

    def checksums(self) -> dict[str, str]:
        """Of the weights, by layer."""
        return {name: weight.checksum for name, weight in self.weights.items()}


def local_checkpoint(model: nn.Module) -> Path | None:
    """The folder that the model's configuration says it was loaded from, where it holds safetensors."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    folder = Path(name)
    return folder if any((folder / file).is_file() for file in (_SINGLE, _INDEX)) else None


def _keys(checkpoint: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint."""
    if checkpoint.is_dir():
        index = checkpoint / _INDEX
        if not index.is_file():
            return _keys(checkpoint / _SINGLE)
        try:
            read = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique_names)
            files = {checkpoint / Path(name).name for name in read["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a weight_map of file names in {index}, got {error!r}") from error
        return {key: file for each in sorted(files) for key, file in _keys(each).items()}
    if not checkpoint.is_file():
        raise ValueError(
            f"expected a safetensors file, or a folder with {_SINGLE} or an index, got {checkpoint}"
        )
    return dict.fromkeys(_open(checkpoint).keys(), checkpoint)


def _match(wanted: str, keys: Mapping[str, Path], checkpoint: Path) -> str | None:
    if wanted in keys:
        return wanted
    near = [
        key for key in keys if ("." in key and f".{wanted}".endswith(f".{key}")) or key.endswith(f".{wanted}")
    ]
    if len(near) > 1:
        raise ValueError(f"expected one {wanted} in {checkpoint}, got {near}")
    return next(iter(near), None)


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("a checkpoint's blocks are read with safetensors: install it") from error
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {file} as safetensors: {error}") from error
