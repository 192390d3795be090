"""Splits, batches and the folder or hub a table comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dynaprune.experiment.tasks import Split, TaskData
from dynaprune.experiment.tasks.data import (
    Served,
    batches,
    batches_per_epoch,
    mlp,
    read_table,
    split_rows,
    split_train,
    training_batches,
)

LABELS = np.repeat([0, 1, 2], [300, 150, 50])


def test_a_split_covers_all_rows_once_and_keeps_the_class_shares() -> None:
    train, validation, test = split_rows(LABELS, Split(seed=3))
    assert np.array_equal(np.sort(np.concatenate([train, validation, test])), np.arange(500))
    assert (len(train), len(validation), len(test)) == (350, 50, 100)
    for part in (train, validation, test):
        assert np.abs(np.bincount(LABELS[part]) / len(part) - [0.6, 0.3, 0.1]).max() < 0.01


def test_the_test_parts_of_all_folds_are_the_whole_data() -> None:
    parts = [split_rows(LABELS, Split(seed=1, fold=k, folds=5)) for k in range(5)]
    assert np.array_equal(np.sort(np.concatenate([test for _, _, test in parts])), np.arange(500))
    for train, validation, test in parts:
        assert len(np.unique(np.concatenate([train, validation, test]))) == 500


def test_a_split_depends_on_its_seed_alone() -> None:
    for fold, folds in ((None, None), (2, 5)):
        same = [split_rows(LABELS, Split(7, fold, folds))[2] for _ in range(2)]
        assert np.array_equal(*same)
        assert not np.array_equal(same[0], split_rows(LABELS, Split(8, fold, folds))[2])


@pytest.mark.parametrize(("fold", "folds", "said"), [(5, 5, "0..4"), (None, 5, "0..4"), (0, 1, "at least 2")])
def test_a_fold_that_does_not_exist_is_refused(fold: int | None, folds: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        split_rows(LABELS, Split(0, fold, folds))


class _Rows(Dataset):  # type: ignore[type-arg]
    """The same rows as a `TensorDataset`, without being one."""

    def __init__(self, tensors: TensorDataset) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, ...]:
        return self.tensors[row]


@pytest.mark.parametrize("wrap", [lambda d: d, _Rows], ids=["tensors", "items"])
def test_batches_show_every_row_once_in_an_order_that_the_generator_decides(wrap) -> None:  # type: ignore[no-untyped-def]
    data = wrap(TensorDataset(torch.arange(70.0).view(35, 2), torch.arange(35)))

    def order(seed: int) -> list[int]:
        seen = list(batches(data, 8, torch.Generator().manual_seed(seed)))
        assert len(seen) == batches_per_epoch(data, 8) == 5
        for inputs, targets in seen:
            assert torch.equal(inputs[:, 0], 2.0 * targets)
        return torch.cat([targets for _, targets in seen]).tolist()

    assert sorted(order(0)) == list(range(35))
    assert order(0) == order(0) != order(1)
    assert torch.cat([targets for _, targets in batches(data, 8)]).tolist() == list(range(35))


def test_dropout_changes_neither_the_initial_weights_nor_their_order() -> None:
    torch.manual_seed(5)
    plain = list(mlp([6, 8, 8, 3], 0.0).parameters())
    torch.manual_seed(5)
    dropped = mlp([6, 8, 8, 3], 0.5)
    assert sum(isinstance(m, torch.nn.Dropout) for m in dropped) == 2
    for a, b in zip(plain, dropped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_without_the_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"titanic/train\.parquet"):
        read_table(str(tmp_path), "titanic", "hub/name")


def test_an_unreachable_hub_says_what_to_do_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.delenv("DYNAPRUNE_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match=r"DYNAPRUNE_DATA.*titanic/train\.parquet"):
        read_table(None, "titanic", "hub/name")


def test_the_hub_gives_the_same_table_as_the_folder(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    asked = []

    def from_file(name: str, split: str, revision: str) -> object:
        asked.append((name, split, revision))
        return load("parquet", data_files={"train": str(data_dir / "titanic" / "train.parquet")}, split=split)

    monkeypatch.setattr(datasets, "load_dataset", from_file)
    hub, source = read_table("hub", "titanic", "some/name", revision="abc")
    folder, _ = read_table(str(data_dir), "titanic", "some/name")
    assert asked == [("some/name", "train", "abc")] and source == "hub:some/name@abc"
    assert hub.column_names == folder.column_names and hub.to_pylist() == folder.to_pylist()


@pytest.mark.parametrize("train_samples", [0, 32, 100, 277, 280])
def test_a_training_part_is_split_by_class_and_seed_and_only_once(train_samples: int) -> None:
    labels = np.repeat([0, 1, 2, 3], [80, 120, 40, 80])
    train, validation = split_train(labels, Split(4), train_samples)
    wanted = train_samples or 280
    assert (len(train), len(validation)) == (wanted, -(-wanted // 7)) and not set(train) & set(validation)
    for part in (train, validation):
        assert (np.diff(part) > 0).all()
        assert np.abs(np.bincount(labels[part]) - len(part) * np.array([2, 3, 1, 2]) / 8).max() <= 1
    again, other = split_train(labels, Split(4), train_samples), split_train(labels, Split(5), train_samples)
    assert np.array_equal(train, again[0]) and not np.array_equal(validation, other[1])
    assert set(train) <= set(split_train(labels, Split(4))[0])


@pytest.mark.parametrize("train_samples", [-1, 31, 281])
def test_a_number_of_samples_that_cannot_be_drawn_is_refused(train_samples: int) -> None:
    labels = np.repeat([0, 1, 2, 3], 80)
    with pytest.raises(ValueError, match=f"from 32 to 280 .*got {train_samples}"):
        split_train(labels, Split(4), train_samples)
    with pytest.raises(ValueError, match="--seeds"):
        split_train(labels, Split(4, fold=0, folds=5))


def test_the_user_may_choose_the_commit_and_else_the_newest_is_named(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    load, asked = datasets.load_dataset, []

    def from_file(name: str, split: str, revision: str) -> object:
        asked.append(revision)
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")
        return load("parquet", data_files={"train": str(data_dir / "titanic" / "train.parquet")}, split=split)

    class Newest:
        sha = "f" * 40

    monkeypatch.setattr(datasets, "load_dataset", from_file)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: Newest)
    assert read_table("hub", "titanic", "some/name")[1] == f"hub:some/name@{'f' * 40}"
    assert read_table("hub@abc", "titanic", "some/name", revision="def")[1] == "hub:some/name@abc"
    assert asked == ["f" * 40, "abc"]
    with pytest.raises(ValueError, match="some/name has no part 'test'"):
        read_table("hub", "titanic", "some/name", "test", "def")


def test_every_task_of_the_hub_but_titanic_pins_a_commit() -> None:
    from dynaprune.experiment.tasks import cifar10, imdb, spoken_digits

    for module in (cifar10, imdb, spoken_digits):
        assert len(module.HUB_REVISION) == 40 and int(module.HUB_REVISION, 16)


class _Rows(Dataset[Any]):
    """Not a TensorDataset: served through torch's DataLoader. ``fetched`` are the rows asked for."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        self.fetched.append(row)
        return torch.tensor([float(row)]), row


@pytest.mark.parametrize("rows", [12, 14, 3])
@pytest.mark.parametrize("kind", ["tensors", "rows"])
def test_a_pass_goes_on_after_any_batch_as_if_it_had_never_stopped(rows: int, kind: str) -> None:
    """The augmentation draws from the same generator between two batches."""
    tensors = TensorDataset(torch.arange(float(rows)).unsqueeze(1), torch.arange(rows))
    part = tensors if kind == "tensors" else _Rows(rows)
    data = TaskData(
        part, part, part, classes=2, augment=lambda inputs, g: inputs + torch.rand(1, generator=g)
    )
    generator = torch.Generator().manual_seed(3)
    began, whole, states = generator.get_state(), [], []
    for inputs, targets in training_batches(data, 4, generator):
        whole.append((inputs, targets))
        states.append(generator.get_state())
    end = generator.get_state()
    for served in range(1, len(whole) + 1):
        if isinstance(part, _Rows):
            part.fetched.clear()
        other = torch.Generator().manual_seed(99)
        rest = list(training_batches(data, 4, other, Served(served, began, states[served - 1])))
        assert len(rest) == len(whole) - served and torch.equal(other.get_state(), end)
        for (inputs, targets), (mine, own) in zip(whole[served:], rest, strict=True):
            assert torch.equal(inputs, mine) and torch.equal(targets, own)
        if isinstance(part, _Rows):
            assert len(part.fetched) == sum(len(targets) for _, targets in rest)
    assert sorted(torch.cat([targets for _, targets in whole]).tolist()) == list(range(rows))
    with pytest.raises(ValueError, match="at least one batch"):
        Served(0, began, began)


def test_batches_are_drawn_as_torchs_own_loader_draws_them() -> None:
    mine, torchs = (torch.Generator().manual_seed(3) for _ in range(2))
    loader = DataLoader(_Rows(14), 4, shuffle=True, generator=torchs)
    for _ in range(2):
        for (_, a), (_, b) in zip(batches(_Rows(14), 4, mine), loader, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(mine.get_state(), torchs.get_state())
