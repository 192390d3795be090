"""Reading a task's data from a folder or the hub, splitting it, and serving it in batches."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from dynaprune.experiment.tasks import Split, TaskData

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "Served",
    "batches",
    "batches_per_epoch",
    "data_source",
    "mlp",
    "on_hub",
    "read_table",
    "refuse_same_rows",
    "split_rows",
    "split_train",
    "training_batches",
]

HUB_HINT = (
    "On a machine without network: set DYNAPRUNE_DATA (or pass --data) to a folder that holds {file}, "
    "a parquet file with the hub's columns."
)


def split_rows(labels: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers ``(train, validation, test)``, stratified by ``labels [n]``, each sorted, disjoint,
    together all rows.

    Test: fold ``split.fold`` of ``split.folds``, or one fifth. Validation: one eighth of what is left."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    fold = split.fold
    if split.folds is not None:
        if split.folds < 2:
            raise ValueError(f"folds must be at least 2, got {split.folds}")
        if fold is None or not 0 <= fold < split.folds:
            raise ValueError(f"fold must be in 0..{split.folds - 1}, got {fold}")
    rows = np.arange(len(labels))
    with _told_of_too_few(labels):
        if split.folds is None or fold is None:
            rest, test = train_test_split(rows, test_size=0.2, stratify=labels, random_state=split.seed)
        else:
            folds = StratifiedKFold(split.folds, shuffle=True, random_state=split.seed)
            rest, test = list(folds.split(rows, labels))[fold]
        train, validation = train_test_split(
            rest, test_size=0.125, stratify=labels[rest], random_state=split.seed
        )
    return np.sort(train), np.sort(validation), np.sort(test)


def split_train(labels: np.ndarray, split: Split, train_samples: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers ``(train, validation)`` of a training part that has its own test part beside it: disjoint,
    each sorted, stratified by ``labels [n]`` and drawn by ``split.seed``.

    One eighth of all rows is for validation. ``train_samples`` above 0 thins both parts by class to that many
    and a seventh of it, so that a smaller training is still one eighth validation.

    Raises:
        ValueError: folds are asked for, or a number of samples below 8 per class or above what there is."""
    from sklearn.model_selection import train_test_split

    if split.folds is not None:
        raise ValueError(
            "the official test part stays as it is in every run: repeat over --seeds, not over --folds"
        )
    rows, classes = np.arange(len(labels)), len(np.unique(labels))
    with _told_of_too_few(labels):
        train, validation = train_test_split(rows, test_size=0.125, stratify=labels, random_state=split.seed)
    if train_samples == 0:
        return np.sort(train), np.sort(validation)
    if not 8 * classes <= train_samples <= len(train):
        raise ValueError(
            f"train_samples must be 0 (all) or from {8 * classes} to {len(train)} (the training part without "
            f"validation), got {train_samples}"
        )
    return _thinned(train, labels, train_samples), _thinned(validation, labels, -(-train_samples // 7))


@contextlib.contextmanager
def _told_of_too_few(labels: np.ndarray) -> Iterator[None]:
    """Says of which class there are too few rows to split them."""
    try:
        yield
    except ValueError as error:
        classes, counts = np.unique(labels, return_counts=True)
        rarest = int(counts.argmin())
        raise ValueError(
            f"cannot split {len(labels)} rows of {len(classes)} classes by class (the rarest, "
            f"{classes[rarest]}, has {counts[rarest]}): {error}"
        ) from None


def _thinned(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """``count`` of ``rows``, the first of each class in their order, as many as is its share; sorted."""
    place = np.empty(len(rows))
    for label in np.unique(labels[rows]):
        of_class = labels[rows] == label
        place[of_class] = (np.arange(of_class.sum()) + 0.5) / of_class.sum()
    return np.sort(rows[np.argsort(place, kind="stable")[:count]])


def data_source(source: str | None) -> str:
    """Where a task's data come from: ``source`` where it is given, else DYNAPRUNE_DATA, else "hub".

    "hub@REVISION" is the hub at a commit of the user's choice."""
    return source or os.environ.get("DYNAPRUNE_DATA") or "hub"


def on_hub(source: str) -> bool:
    """Whether a `data_source` is the hub, and no folder."""
    return source == "hub" or source.startswith("hub@")


def read_table(
    source: str | None, folder: str, hub_name: str, part: str = "train", revision: str | None = None
) -> tuple[pyarrow.Table, str]:
    """A table of rows and where it came from.

    ``source`` is a folder that holds ``<folder>/<part>.parquet``, ``"hub"`` (at the commit ``revision``;
    None: at its newest, which the origin names) or ``"hub@COMMIT"``, or None: DYNAPRUNE_DATA where it is set,
    else the hub data set ``hub_name``.

    Raises:
        FileNotFoundError: a folder without the file. ConnectionError: a hub that cannot be reached, with what
            to do about it. ValueError: a file that is no parquet table, a part that the data set lacks."""
    source = data_source(source)
    if not on_hub(source):
        return _from_folder(Path(source).expanduser(), f"{folder}/{part}.parquet", source)
    hint = HUB_HINT.format(file=f"{folder}/{part}.parquet")
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"reading {hub_name} from the hub needs the package `datasets` (pip install datasets). {hint}"
        ) from error
    try:
        commit = source.partition("@")[2] or revision or huggingface_hub.HfApi().dataset_info(hub_name).sha
        table = datasets.load_dataset(hub_name, split=part, revision=commit)
    except Exception as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise ValueError(f"the hub data set {hub_name} has no part {part!r}: {error}") from error
        raise ConnectionError(
            f"could not load {hub_name!r} from the hub ({type(error).__name__}: {error}). {hint}"
        ) from error
    return table.with_format("arrow")[:], f"hub:{hub_name}@{commit}"


def _from_folder(folder: Path, name: str, given: str) -> tuple[pyarrow.Table, str]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"expected the table {name} in the data folder {given}; it is not there")
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path).read(), name
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"expected a parquet table in {path}, got a file that cannot be read: {said}"
        ) from error


def refuse_same_rows(train: pyarrow.Table, test: pyarrow.Table, origin: str) -> None:
    """ValueError where the test part is the training part over again."""
    if train.num_rows == test.num_rows and train.equals(test):
        raise ValueError(f"{origin}: the test part has the same {test.num_rows} rows as the training part")


def batches_per_epoch(dataset: Dataset[Any], batch_size: int) -> int:
    """Batches in one pass, the last and smaller one included."""
    return -(-len(dataset) // batch_size)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Served:
    """How far a pass in random order has come: its first ``batches``, at least one, were served.

    ``began`` and ``now`` are the states of its generator before the pass and after those batches."""

    batches: int
    began: torch.Tensor
    now: torch.Tensor

    def __post_init__(self) -> None:
        if self.batches < 1:  # the order is drawn with the first one
            raise ValueError(f"expected at least one batch that was served, got {self.batches}")


@dataclass(frozen=True)
class _Rest:
    """The row numbers of each batch that is left of a pass; what was served is drawn and left out."""

    every: BatchSampler
    generator: torch.Generator
    served: Served | None

    def __iter__(self) -> Iterator[list[int]]:
        left = iter(self.every)
        if self.served is not None:
            for _ in itertools.islice(left, self.served.batches):
                pass
            self.generator.set_state(self.served.now)
        yield from left


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    generator: torch.Generator | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    served: Served | None = None,
) -> Iterator[tuple[Any, torch.Tensor]]:
    """``(inputs, targets)`` batches of one pass: in random order by ``generator``, in the data's order
    without one.

    The order depends on the generator's state alone, so that two arms with the same seed see the same
    batches. With ``served`` the pass goes on after that many batches, which are not fetched again, and the
    generator's states before and after each further batch are those of the whole pass."""
    if generator is None:
        yield from _in_order(dataset, batch_size, collate)
        return
    if served is not None:
        generator.set_state(served.began)
    if isinstance(dataset, TensorDataset):
        order = torch.randperm(len(dataset), generator=generator)
        if served is not None:
            generator.set_state(served.now)
        for start in range(served.batches * batch_size if served is not None else 0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield tuple(t[chosen] for t in dataset.tensors)  # type: ignore[misc]
        return
    sampler = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    rest = _Rest(BatchSampler(sampler, batch_size, drop_last=False), generator, served)
    yield from DataLoader(dataset, batch_sampler=rest, generator=generator, collate_fn=collate)


def _in_order(
    dataset: Dataset[Any], batch_size: int, collate: Callable[[list[Any]], Any] | None
) -> Iterator[tuple[Any, torch.Tensor]]:
    if isinstance(dataset, TensorDataset):
        for start in range(0, len(dataset), batch_size):
            yield tuple(t[start : start + batch_size] for t in dataset.tensors)  # type: ignore[misc]
        return
    yield from DataLoader(dataset, batch_size, collate_fn=collate)


def training_batches(
    data: TaskData, batch_size: int, generator: torch.Generator, served: Served | None = None
) -> Iterator[tuple[Any, torch.Tensor]]:
    """One pass over the training part in random order, augmented; order and augmentation depend on
    ``generator`` alone. With ``served`` what is left of a pass, see `batches`."""
    for inputs, targets in batches(data.train, batch_size, generator, data.collate, served):
        yield (data.augment(inputs, generator) if data.augment else inputs), targets


def mlp(widths: list[int], dropout: float) -> torch.nn.Sequential:
    """Linear-ReLU(-dropout) through ``widths``, ending in a Linear: the same initial weights with and without
    dropout."""
    layers: list[torch.nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers.append(torch.nn.Linear(inputs, outputs))
        if i < len(widths) - 2:
            layers.append(torch.nn.ReLU())
            if dropout > 0:
                layers.append(torch.nn.Dropout(dropout))
    return torch.nn.Sequential(*layers)
