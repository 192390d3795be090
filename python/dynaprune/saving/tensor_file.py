"""A safetensors file that carries a checksum of itself, written and read without trusting a byte of it.

The checksum stands at the start of the header, in ``__metadata__``. It is the SHA-256 of the whole file, its
own 64 digits taken as zeros: a change of any bit is found. Equal tensors and metadata give equal bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dynaprune.saving.durable import write_file

__all__ = ["TensorFile", "read_tensors", "write_tensors"]

CHECKSUM = "checksum"
_START = b'{"__metadata__":{"checksum":"sha256:'
_DIGITS = 64
_SEALED = re.compile(re.escape(_START) + rb'[0-9a-f]{64}"')
_MAX_HEADER, _MAX_VALUES = 32 * 2**20, 2_000_000
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    Attributes:
        metadata: text by name, without the checksum.
        sealed: whether the file carried a checksum (that agrees; otherwise it cannot be read).
    """

    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    sealed: bool


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum, all at once or not at all, and bring it to the disk.

    Raises:
        ValueError: a dtype that the format has no name for, or a name that it keeps for itself.
        OSError: see :func:`dynaprune.saving.durable.write_file`.
    """
    header: dict[str, Any] = {"__metadata__": {CHECKSUM: "sha256:" + "0" * _DIGITS, **metadata}}
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    end = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _NAMES or key in header:
            raise ValueError(f"cannot store {key} of {tensor.dtype} in a safetensors file")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"expected at most {_MAX_HEADER} bytes of names and structure, got {len(text)}")

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        start: list[Any] = [struct.pack("<Q", len(text)), text]
        for part in itertools.chain(start, (_bytes_of(tensors[key]) for key in order)):
            digest.update(part)
            file.write(part)
        file.seek(8 + len(_START))
        file.write(digest.hexdigest().encode())

    write_file(path, write)


def _bytes_of(tensor: Tensor) -> Any:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_tensors(path: Path) -> TensorFile:
    """Read a safetensors file; one that carries a checksum is held to it.

    The tensors lie in one buffer on the CPU, as large as the file.

    Raises:
        ValueError: a damaged file, or none of the format. OSError: one that cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        start = _exactly(file, min(8, status.st_size))
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, status.st_size - 8):
            raise ValueError(f"its header is said to have {length} bytes, the file has {status.st_size}")
        text = _exactly(file, length)
        metadata, entries = _parsed(text)
        sealed = _SEALED.match(text) is not None
        if (CHECKSUM in metadata) != sealed:
            raise ValueError("its checksum is not in its place")
        body = status.st_size - 8 - length
        _check_offsets(entries, body)
        buffer = torch.empty(body, dtype=torch.uint8)
        _fill(file, buffer.numpy().data)
    if sealed:
        at = len(_START)
        stated = text[at : at + _DIGITS].decode()
        digest = hashlib.sha256(start + text[:at] + b"0" * _DIGITS + text[at + _DIGITS :])
        digest.update(buffer.numpy().data)
        if digest.hexdigest() != stated:
            raise ValueError("its content does not agree with its checksum: the file is damaged")
    tensors = {key: _tensor(key, buffer, *entry) for key, entry in entries.items()}
    return TensorFile({k: v for k, v in metadata.items() if k != CHECKSUM}, tensors, sealed)


def _exactly(file: Any, count: int) -> bytes:
    found = bytearray(count)
    _fill(file, memoryview(found))
    return bytes(found)


def _fill(file: Any, space: memoryview) -> None:
    done = 0
    while done < len(space):
        count = file.readinto(space[done:])
        if not count:
            raise ValueError(f"it ended {len(space) - done} bytes early")
        done += count


_Entry = tuple[torch.dtype, list[int], int, int]


def _parsed(text: bytes) -> tuple[dict[str, str], dict[str, _Entry]]:
    """Metadata and tensors of a header. Sizes are counted before the JSON is made into objects."""
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise ValueError(f"its header has more than {_MAX_VALUES} values")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_names)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not text by name")
    return metadata, {key: _entry(key, value) for key, value in header.items()}


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for JSON: ValueError for a name that stands twice in one object."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {max(names, key=names.count)[:80]!r} stands twice in one JSON object")
    return found


def _entry(key: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its tensor {key[:80]!r} has not the entries dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"its tensor {key[:80]!r} has an unknown dtype {str(value['dtype'])[:40]!r}")
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"its tensor {key[:80]!r} has a shape or offsets that are no whole numbers")
    size = dtype.itemsize
    for each in shape:
        size *= each
        if size > 2**62:
            raise ValueError(f"its tensor {key[:80]!r} has a shape that no memory holds")
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"its tensor {key[:80]!r} has {offsets[1] - offsets[0]} bytes, its shape {size}")
    return dtype, shape, offsets[0], offsets[1]


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)


def _check_offsets(entries: Mapping[str, _Entry], size: int) -> None:
    """The tensors lie one behind the other from the first byte to the last."""
    end = 0
    for start, stop in sorted((start, stop) for _, _, start, stop in entries.values()):
        if start != end:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, {size} are there")


def _tensor(key: str, buffer: Tensor, dtype: torch.dtype, shape: list[int], start: int, stop: int) -> Tensor:
    part = buffer[start:stop]
    if dtype == torch.bool and part.numel() and int(part.max()) > 1:
        raise ValueError(f"its tensor {key[:80]!r} of truth values holds others than 0 and 1")
    if start % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).reshape(shape)
