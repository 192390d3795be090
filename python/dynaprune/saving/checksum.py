"""A checksum of nested values, for states that others write into their own files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["checksum_of", "verify"]


def checksum_of(value: Any) -> str:
    """SHA-256, in 64 hexadecimal digits, of dicts (in any order), lists or tuples, tensors and plain values.

    Tensors count by dtype, shape and bytes, numbers by type and value."""
    digest = hashlib.sha256()

    def add(kind: str, text: bytes) -> None:
        digest.update(f"{kind}{len(text)}:".encode())
        digest.update(text)

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            add("t", f"{item.dtype}{list(item.shape)}".encode())
            flat = item.detach().to("cpu").contiguous().reshape(-1)
            add("b", flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            add("d", str(len(item)).encode())
            for key in sorted(item, key=repr):
                add("k", repr(key).encode())
                visit(item[key])
        elif isinstance(item, (list, tuple)):
            add("l", str(len(item)).encode())
            for each in item:
                visit(each)
        else:
            add("v", f"{type(item).__name__} {item!r}".encode())

    visit(value)
    return digest.hexdigest()


def verify(value: Any, stated: Any, what: str) -> None:
    """ValueError unless ``stated`` is the checksum of ``value``, or None: what was written before there were
    checksums has none."""
    if stated is not None and stated != checksum_of(value):
        raise ValueError(f"{what} does not agree with its checksum: the checkpoint is damaged")
