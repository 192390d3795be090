"""The task cifar10: its rows, its augmentation, its network, and what its reports say of the copy."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

from dynaprune import load as load_checkpoint
from dynaprune.experiment import metrics, steps
from dynaprune.experiment.report import build_report
from dynaprune.experiment.report_text import write_markdown
from dynaprune.experiment.run_config import resolve
from dynaprune.experiment.tasks import Split, TaskData, get_task
from dynaprune.experiment.tasks.cifar10 import augment, channel_statistics, decode, image_format
from dynaprune.experiment.tasks.data import split_train, training_batches
from dynaprune.experiment.tasks.resnet import resnet18_channels
from dynaprune.experiment.train import run_arm
from dynaprune.nn import BlockSparseConv2d, swap_layers
from tests.experiment.killed import differences_when_killed

TASK = get_task("cifar10")
SMALL = {"train_samples": 200, "width": 0.25}


def _rows(folder: Path, name: str, count: int) -> pyarrow.Table:
    """``count`` rows of the real data, as many of each class."""
    table = parquet.read_table(folder / "cifar10" / f"{name}.parquet")
    labels = table.column("label").to_numpy()
    chosen = np.concatenate([np.flatnonzero(labels == label)[: count // 10] for label in range(10)])
    return table.take(np.sort(chosen)).select(["img", "label"])


def _folder(root: Path, train: pyarrow.Table, test: pyarrow.Table) -> Path:
    (root / "cifar10").mkdir(parents=True)
    parquet.write_table(train, root / "cifar10" / "train.parquet")
    parquet.write_table(test, root / "cifar10" / "test.parquet")
    return root


@pytest.fixture(scope="module")
def jpeg(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 and 60 rows of the JPEG copy."""
    root = tmp_path_factory.mktemp("jpeg")
    return _folder(root, _rows(data_dir, "train", 300), _rows(data_dir, "test", 60))


@pytest.fixture(scope="module")
def data(jpeg: Path) -> TaskData:
    return TASK.load(Split(0, source=str(jpeg)), SMALL)


def test_the_official_parts_are_whole_and_the_images_are_the_files(data_dir: Path) -> None:
    data = TASK.load(Split(2, source=str(data_dir)), {"train_samples": 100, "width": 0.25})
    assert data.description["sizes"] == [100, 15, 10_000]
    assert torch.bincount(data.test.tensors[1]).tolist() == [1000] * 10  # type: ignore[attr-defined]
    images = data.test.tensors[0]  # type: ignore[attr-defined]
    assert images.dtype == torch.uint8 and images.shape == (10_000, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    table = parquet.read_table(data_dir / "cifar10" / "train.parquet")
    rows, _ = split_train(table.column("label").to_numpy(), Split(2), 100)
    train, labels = data.train.tensors  # type: ignore[attr-defined]
    for place in (0, 57, 99):
        row = table.slice(int(rows[place]), 1).to_pylist()[0]
        pixels = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])))
        assert np.array_equal(train[place].permute(1, 2, 0).numpy(), pixels)
        assert int(labels[place]) == row["label"]


def test_the_copy_is_named_by_what_the_bytes_are(data_dir: Path, jpeg: Path, tmp_path: Path) -> None:
    test = _rows(data_dir, "lossless_test", 60)
    lossless = _folder(tmp_path / "a", _rows(data_dir, "lossless_train", 300), test)
    said = TASK.load(Split(0, source=str(lossless)), SMALL).description
    assert said["formats"] == ["PNG"] and "copy" not in said and "note" not in said
    said = TASK.load(Split(0, source=str(jpeg)), SMALL).description
    assert said["formats"] == ["JPEG"] and "JPEG" in said["copy"] and "JPEG-compressed" in said["note"]
    mixed = _folder(tmp_path / "b", _rows(data_dir, "train", 300), test)
    said = TASK.load(Split(0, source=str(mixed)), SMALL).description
    assert said["formats"] == ["JPEG", "PNG"] and "JPEG" in said["copy"]
    assert image_format(b"GIF89a") == "other"


def test_the_report_says_beside_the_accuracy_which_copy_it_is_of(data: TaskData, tmp_path: Path) -> None:
    def written(description: dict[str, Any]) -> str:
        arm = {"test_accuracy": 0.7, "test_f1": 0.6, "data": description, "interrupted": False}
        arm |= {"best_epoch": 1, "state": "ran all epochs", "epochs": 1}
        report = build_report(resolve("cifar10").to_json(), {}, {"baseline": dict(arm), "pruned": dict(arm)})
        write_markdown(tmp_path / "report.md", report, [])
        return (tmp_path / "report.md").read_text()

    text = written(data.description)
    assert "| test accuracy (CIFAR-10, JPEG copy) | 70.00 % |" in text
    assert "| test F1 (CIFAR-10, JPEG copy) |" in text and data.description["note"] in text
    plain = {k: v for k, v in data.description.items() if k not in ("copy", "note")}
    assert "| test accuracy | 70.00 % |" in written(plain) and "JPEG" not in written(plain)


def test_statistics_are_the_training_parts(data: TaskData) -> None:
    pixels = data.train.tensors[0].double() / 255  # type: ignore[attr-defined]
    mean, deviation = channel_statistics(data.train.tensors[0])  # type: ignore[attr-defined]
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    wanted = pixels.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(torch.tensor(deviation).double(), wanted, rtol=1e-6, atol=0)
    assert (data.description["mean"], data.description["deviation"]) == (mean, deviation)
    seen: list[Tensor] = []
    model = TASK.build_model(data, 0.0)
    model.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    model(data.train.tensors[0])  # type: ignore[attr-defined]
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-4
    assert (seen[0].var((0, 2, 3)) - 1).abs().max() < 1e-3


def test_augmented_images_are_crops_of_the_padded_ones_and_their_mirror_images(data: TaskData) -> None:
    images = data.train.tensors[0][:150]  # type: ignore[attr-defined]
    before = images.clone()
    changed = augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(images, before)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert changed.is_contiguous(memory_format=torch.channels_last)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    rows, columns, mirrored = set(), set(), 0
    for image, source in zip(changed, padded, strict=True):
        found = [
            (down, across, flip)
            for down in range(9)
            for across in range(9)
            for flip in (False, True)
            if torch.equal(
                image.flip(2) if flip else image, source[:, down : down + 32, across : across + 32]
            )
        ]
        assert found
        rows.add(found[0][0])
        columns.add(found[0][1])
        mirrored += found[0][2]
    assert rows == columns == set(range(9)) and 50 < mirrored < 100
    assert torch.equal(changed, augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(changed, augment(images, torch.Generator().manual_seed(2)))


def test_only_training_batches_are_augmented_and_by_their_generator(data: TaskData) -> None:
    def epoch(seed: int) -> list[Tensor]:
        return [x for x, _ in training_batches(data, 64, torch.Generator().manual_seed(seed))]

    assert [len(x) for x in epoch(0)] == [64, 64, 64, 8]
    assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(0), strict=True))
    known = {image.numpy().tobytes() for image in data.train.tensors[0]}  # type: ignore[attr-defined]
    unchanged = sum(image.numpy().tobytes() in known for image in torch.cat(epoch(0)))
    assert unchanged < 20


def test_dropout_sits_before_the_classifier_and_changes_no_initial_weight(data: TaskData) -> None:
    models = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(11)
        models.append(TASK.build_model(data, dropout).eval())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert [n for n, m in models[1].named_modules() if isinstance(m, nn.Dropout)] == ["dropout"]
    x = data.train.tensors[0][:8]  # type: ignore[attr-defined]
    assert torch.equal(models[0](x), models[1](x))
    models[1].dropout.train()  # type: ignore[union-attr]
    assert not torch.equal(models[0](x), models[1](x))


def test_every_convolution_is_handed_channels_last_tensors(data: TaskData) -> None:
    """Forward and backward, dense and block-sparse: no kernel has to copy its input or gradient first."""
    model = TASK.build_model(data, 0.0).train()
    swap_layers(model, 16)
    assert sum(isinstance(m, BlockSparseConv2d) for m in model.modules()) == 19
    seen: list[bool] = []

    def watch(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        y.register_hook(lambda dy: seen.append(dy.is_contiguous(memory_format=torch.channels_last)))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, BlockSparseConv2d)):
            module.register_forward_hook(watch)
    x, y = next(training_batches(data, 32, torch.Generator().manual_seed(0)))
    TASK.losses(model(x), y).mean().backward()
    assert len(seen) == 40 and all(seen)


@pytest.mark.parametrize(
    ("width", "channels"), [(1.0, (64, 128, 256, 512)), (0.5, (32, 64, 128, 256)), (0.2, (16, 24, 48, 104))]
)
def test_width_scales_all_channels(width: float, channels: tuple[int, ...]) -> None:
    assert resnet18_channels(width) == channels


def test_wrong_input_is_refused_with_what_was_expected(jpeg: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="official test part"):
        TASK.load(Split(0, fold=0, folds=3, source=str(jpeg)), SMALL)
    with pytest.raises(ValueError, match=r"at least 0\.125.*got 0\.0"):
        TASK.load(Split(0, source=str(jpeg)), {**SMALL, "width": 0.0})
    with pytest.raises(ValueError, match=r"80 to 262 .*got 273"):
        TASK.load(Split(0, source=str(jpeg)), {**SMALL, "train_samples": 273})
    train = parquet.read_table(jpeg / "cifar10" / "train.parquet")
    test = parquet.read_table(jpeg / "cifar10" / "test.parquet")
    lacking = _folder(tmp_path / "a", train.drop_columns(["label"]), test)
    with pytest.raises(ValueError, match="lacks label"):
        TASK.load(Split(0, source=str(lacking)), SMALL)
    many = train.set_column(1, "label", pyarrow.array(np.arange(300) % 100))
    with pytest.raises(ValueError, match=r"row 10, column label: expected labels 0 to 9, got 10"):
        TASK.load(Split(0, source=str(_folder(tmp_path / "b", many, test))), SMALL)
    with pytest.raises(ValueError, match="encoded image in row 1"):
        decode([train.column("img")[0].as_py()["bytes"], b"no image"])
    large = io.BytesIO()
    Image.new("RGB", (40, 32)).save(large, "PNG")
    with pytest.raises(ValueError, match=r"32x32 pixels, got \(40, 32\)"):
        decode([large.getvalue()])


def test_the_pruned_arm_runs_and_recalibrates_before_it_is_evaluated(
    jpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((steps, "_ROUNDS"), (steps, "_STEPS_PER_ROUND"), (metrics, "STEPS_TIMED")):
        monkeypatch.setattr(module, name, 1)
    config = resolve(
        "cifar10",
        data=str(jpeg),
        device="cpu",
        epochs=2,
        batch_size=20,
        block_size=8,
        target_sparsity=0.6,
        calibration_samples=64,
        options={"train_samples": 100, "width": 0.125},
    )
    result = run_arm(config, "pruned", tmp_path, quiet=True)
    assert result["target_reached"] and result["sparsity"] >= 0.6 and result["recalibrations"] >= 1
    assert result["training_state_bytes"] < 0.6 * 16 * result["parameters_total"]
    assert json.loads((tmp_path / "arm.json").read_text())["result"]["data"]["copy"] == "CIFAR-10, JPEG copy"
    data = TASK.load(config.split(), config.options)
    model = load_checkpoint(TASK.build_model(data, 0.0), tmp_path / "model.safetensors").eval()
    assert torch.isfinite(model(data.test.tensors[0])).all()  # type: ignore[attr-defined]
    cut = tmp_path / "cut"  # weights and their state lie channels-last
    assert differences_when_killed(config, "pruned", tmp_path, cut, kills=(3, 4)) == []
