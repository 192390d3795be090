"""A fingerprint of a task's data: whether a training goes on with the samples that it began with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, TensorDataset

from dynaprune.experiment.tasks import TaskData
from dynaprune.saving.checksum import checksum_of

__all__ = ["data_fingerprint"]

_SAMPLES = 64
_AT_ONCE = 2**22


def data_fingerprint(data: TaskData) -> str:
    """SHA-256 of the three parts: of tensors every byte, of other data sets their length and 64 samples at
    equal distances."""
    parts = (data.train, data.validation, data.test)
    return checksum_of([list(_checksums(part)) for part in parts])


def _checksums(part: Dataset[Any]) -> Iterator[str | int]:
    rows = len(part)  # type: ignore[arg-type]
    yield rows
    if isinstance(part, TensorDataset):
        for tensor in part.tensors:
            row_bytes = max(1, tensor[:1].numel() * tensor.element_size())
            for some in tensor.split(max(1, _AT_ONCE // row_bytes)):  # no second copy of all of it
                yield checksum_of(some)
        return
    for number in range(min(rows, _SAMPLES)):
        yield checksum_of(part[number * rows // min(rows, _SAMPLES)])
