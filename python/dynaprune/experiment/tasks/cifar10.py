"""``cifar10``: 60,000 photographs of 32x32 pixels in ten classes (Krizhevsky 2009), ResNet-18 with 3x3 stem.

The experiment's settings (Adam at 1e-3, batch 32, L2 1e-4, no schedule) are ``--preset paper``. The task's
own recipe, for both arms, is AdamW with a short warmup and a cosine schedule to zero; patience is long
because such a schedule's best weights come at its end. Blocks are ranked by score per FLOP: ranked per
weight, nearly all of them go from the last stage, which holds most weights and costs little time.

The baseline's dropout sits before the classifier: between convolutions, before a batch norm, it would make
the norm's statistics in training differ from those in evaluation (Li et al., "Understanding the Disharmony
between Dropout and Batch Normalization", CVPR 2019)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dynaprune.experiment.tasks import Split, Task, TaskData
from dynaprune.experiment.tasks.columns import at, class_labels, encoded_files, require_columns
from dynaprune.experiment.tasks.data import read_table, refuse_same_rows, split_train
from dynaprune.experiment.tasks.resnet import CifarResNet, resnet18_channels

if TYPE_CHECKING:
    import pyarrow

HUB_NAME, HUB_REVISION = "uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2"
CLASSES, SIDE, PADDING = 10, 32, 4
_NARROWEST, _WIDTHS = 16, 128  # the first stage has 8 channels at least
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")
_SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}


def image_format(data: bytes) -> str:
    """The format of encoded image bytes by their signature: "JPEG", "PNG", or "other"."""
    return next((name for start, name in _SIGNATURES.items() if data.startswith(start)), "other")


def _row_of_cifar10(row: int) -> str:
    return f"row {row} of cifar10"


def decode(encoded: Sequence[bytes], where: Callable[[int], str] = _row_of_cifar10) -> Tensor:
    """Encoded images as uint8 ``[n, 3, 32, 32]``, channels-last in memory.

    ``where`` names the place of an image in an error.

    Raises:
        ValueError: an image of another size, or bytes that are no image."""
    from PIL import Image

    pixels = np.empty((len(encoded), SIDE, SIDE, 3), dtype=np.uint8)
    for row, data in enumerate(encoded):
        size = (SIDE, SIDE)
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                size = image.size
                if size == (SIDE, SIDE):
                    pixels[row] = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise whatever their libraries do
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"expected an encoded image in {where(row)}, got {said}") from error
        if size != (SIDE, SIDE):
            raise ValueError(f"expected images of {SIDE}x{SIDE} pixels, got {size} in {where(row)}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of ``images [n, 3, height, width]`` padded by 4 black pixels, cropped at random to its size again
    and mirrored in half of the cases; channels-last in memory."""
    count, _, height, width = images.shape
    device = images.device
    padded = nn.functional.pad(images, (PADDING,) * 4)
    draw = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool)
    rows = draw[0] + torch.arange(height)
    columns = torch.arange(width)
    columns = draw[1] + torch.where(mirrored, columns.flip(0), columns)
    sample = torch.arange(count).view(-1, 1, 1)
    at = (each.to(device) for each in (sample, rows.unsqueeze(2), columns.unsqueeze(1)))
    sample, down, across = at
    return padded[sample, :, down, across].permute(0, 3, 1, 2)


def _columns(source: str | None, part: str) -> tuple[pyarrow.Table, list[bytes], np.ndarray, str]:
    """A table with the hub's columns, its encoded images, its labels int64 ``[n]`` and where it came from."""
    table, origin = read_table(source, "cifar10", HUB_NAME, part, HUB_REVISION)
    require_columns(table, ["img", "label"], origin)
    labels = class_labels(table, "label", CLASSES, origin)
    return table, encoded_files(table, "img", origin), labels, origin


def _dataset(
    images: Sequence[bytes], labels: np.ndarray, rows: np.ndarray, origin: str
) -> tuple[TensorDataset, set[str]]:
    encoded = [images[row] for row in rows]
    formats = {image_format(data) for data in encoded}
    pixels = decode(encoded, lambda row: at(origin, int(rows[row]), "img"))
    return TensorDataset(pixels, torch.from_numpy(labels[rows])), formats


def _describe_copy(formats: set[str]) -> dict[str, Any]:
    """What the report says of the images' encoding; JPEG is lossy, and the original images were not."""
    said: dict[str, Any] = {"formats": sorted(formats)}
    if "JPEG" in formats:
        said["copy"] = "CIFAR-10, JPEG copy"
        said["note"] = (
            "The images of this copy of CIFAR-10 are JPEG-compressed, which the original's are not: the "
            "accuracies are those of the JPEG copy, for training and test alike, and cannot be set beside "
            "published ones exactly."
        )
    return said


def load(split: Split, options: Mapping[str, Any]) -> TaskData:
    """The official test part; training and validation part drawn from the official training part by seed.

    Images are uint8 ``[3, 32, 32]``; the model standardises them by the training part's mean and deviation,
    which ``description`` holds.

    Raises:
        ValueError: folds (there is an official test part), wrong ``train_samples`` or ``width``, a table that
            is not CIFAR-10's. FileNotFoundError, ConnectionError: see `read_table`."""
    resnet18_channels(options["width"])
    table, images, labels, source = _columns(split.source, "train")
    train_rows, validation_rows = split_train(labels, split, options["train_samples"])
    test_table, test_images, test_labels, test_source = _columns(split.source, "test")
    refuse_same_rows(table, test_table, test_source)
    (train, formats), (validation, more) = (
        _dataset(images, labels, rows, source) for rows in (train_rows, validation_rows)
    )
    every = np.arange(len(test_images))
    test, test_formats = _dataset(test_images, test_labels, every, test_source)
    mean, deviation = channel_statistics(train.tensors[0])
    description = {
        "source": source,
        "sizes": [len(train), len(validation), len(test)],
        "drawn": "training and validation part from the official training part, stratified, by seed",
        "mean": mean,
        "deviation": deviation,
        **_describe_copy(formats | more | test_formats),
    }
    return TaskData(train, validation, test, CLASSES, description, augment=augment, options=dict(options))


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel of ``images`` uint8 ``[n, 3, height, width]``, of pixels / 255.
    Exact: counted by pixel value."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, deviation = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        average = float((share * values).sum())
        mean.append(average)
        deviation.append(float((share * (values - average) ** 2).sum().sqrt()))
    return mean, deviation


def build_model(data: TaskData, dropout: float) -> nn.Module:
    """ResNet-18 with ``data.options["width"]`` times its channels; ``dropout`` before the classifier."""
    return CifarResNet(
        resnet18_channels(data.options["width"]),
        classes=CLASSES,
        mean=data.description["mean"],
        deviation=data.description["deviation"],
        dropout=dropout,
    )


def narrower(options: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Ever wider networks up to that of ``options``: every width that has other channels."""
    widths: dict[tuple[int, ...], float] = {}
    for number in range(_NARROWEST, math.floor(options["width"] * _WIDTHS) + 1):
        widths.setdefault(resnet18_channels(number / _WIDTHS), number / _WIDTHS)
    return [[{**options, "width": width}] for width in widths.values()]


TASK = Task(
    name="cifar10",
    title="CIFAR-10 (32x32 photographs, ten classes), ResNet-18",
    load=load,
    build_model=build_model,
    defaults={
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup_steps": 200,
        "batch_size": 64,
        "patience": 50,
        "block_size": 16,
        "target_sparsity": 0.8,
        "pruning": {"cost": "flops", "end": 0.4},
    },
    self_paced={"cost": "flops", "end": 0.5},
    options={"train_samples": 0, "width": 1.0},
    width_option="width",
    narrower={"small": narrower},
)
