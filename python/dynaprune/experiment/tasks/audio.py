"""Speech clips for the tasks: decoded from their bytes, resampled to 16 kHz, normalised, padded and masked.

A batch's inputs are ``input_values`` float32 ``[n, length]``, zeros after the end of a clip, and
``attention_mask`` bool ``[n, length]``, true within it: what transformers' Wav2Vec 2.0 takes. Every batch has
the same length, so that step time, FLOPs and memory of one step compare with those of another."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dynaprune.experiment.tasks.columns import at

__all__ = [
    "IGNORED",
    "RATE",
    "Clips",
    "collate",
    "decode",
    "normalise",
    "padded",
    "perturb_speed",
    "read_clip",
    "read_clips",
    "resample",
]

RATE = 16_000
RATES = (1_000, 400_000)
IGNORED = -100
SHORTEST_SECONDS = 0.05
SPEED_RANGE = 0.15
_NEEDED = "reading speech needs the package `{0}` (pip install dynaprune[speech])"


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """Samples float32 ``[frames]`` in -1..1 (the mean of the channels) and their rate in Hz, of a WAV, MP3,
    FLAC or Ogg file's bytes.

    ImportError without soundfile; ValueError for bytes that it cannot decode, a rate that no recording has,
    and samples that are not finite."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(_NEEDED.format("soundfile")) from error
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"expected the bytes of an audio file, got {len(data)} bytes that libsndfile cannot read: {error}"
        ) from error
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"expected sound of {RATES[0]} to {RATES[1]} Hz, got {rate} Hz")
    if not np.isfinite(samples).all():
        raise ValueError("expected finite samples, got NaN or infinite ones")
    return samples.mean(axis=1), int(rate)


def resample(samples: np.ndarray, rate: int, target: int = RATE) -> np.ndarray:
    """``samples [frames]`` of ``rate`` Hz at ``target`` Hz: band-limited, by soxr's high quality."""
    if rate == target:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise ImportError(_NEEDED.format("soxr")) from error
    return np.asarray(soxr.resample(samples, rate, target, quality="HQ"), dtype=samples.dtype)


def normalise(samples: np.ndarray) -> np.ndarray:
    """The clip with mean 0 and variance 1, as transformers' ``Wav2Vec2FeatureExtractor`` does it (silence
    stays silence)."""
    centred = samples - samples.mean()
    return centred / np.sqrt(centred.var() + 1e-7)


def read_clip(data: bytes, max_seconds: float) -> torch.Tensor:
    """A file's bytes as the model's input: float32 ``[frames]`` at 16 kHz, cut after ``max_seconds``,
    normalised.

    ValueError for bytes that are no audio, and for a clip too short for any feature encoder here."""
    samples, rate = decode(data)
    if len(samples) < SHORTEST_SECONDS * rate:
        raise ValueError(
            f"expected clips of at least {SHORTEST_SECONDS} s, got one of {len(samples) / rate:.3f} s"
        )
    frames = round(max_seconds * RATE)
    return torch.from_numpy(normalise(resample(samples, rate)[:frames]))


def read_clips(
    files: Sequence[bytes], rows: Sequence[int], max_seconds: float, origin: str, column: str = "audio"
) -> list[torch.Tensor]:
    """`read_clip` of the files in ``rows``; an error names the table ``origin``, the row and the column."""
    clips = []
    for row in rows:
        try:
            clips.append(read_clip(files[row], max_seconds))
        except ValueError as error:
            raise ValueError(f"{at(origin, row, column)}: {' '.join(str(error).split())}") from error
    return clips


class Clips(Dataset[tuple[torch.Tensor, Any]]):
    """Clips (float32 ``[frames]``, of any lengths) and their targets: a class number, or int64 ``[symbols]``
    per clip."""

    def __init__(self, clips: Sequence[torch.Tensor], targets: Sequence[Any]) -> None:
        if len(clips) != len(targets):
            raise ValueError(f"expected one target per clip, got {len(clips)} clips, {len(targets)} targets")
        self.clips = clips
        self.targets = targets

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, Any]:
        return self.clips[row], self.targets[row]


def collate(
    items: list[tuple[torch.Tensor, Any]], length: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch of ``length`` frames out of clips that are no longer, and their targets int64: ``[n]`` classes,
    or ``[n, symbols]`` filled up with ``IGNORED``."""
    values = torch.zeros(len(items), length)
    mask = torch.zeros(len(items), length, dtype=torch.bool)
    for row, (clip, _) in enumerate(items):
        values[row, : len(clip)] = clip
        mask[row, : len(clip)] = True
    found = [target for _, target in items]
    if isinstance(found[0], torch.Tensor):
        targets = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=IGNORED)
    else:
        targets = torch.tensor(found)
    return {"input_values": values, "attention_mask": mask}, targets


def perturb_speed(inputs: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Each clip of the batch played at a speed of its own, drawn evenly from 0.85 to 1.15, pitch and all (Ko
    et al. 2015, "Audio Augmentation for Speech Recognition"), by linear interpolation; what then passes the
    batch's end is cut."""
    values, mask = inputs["input_values"], inputs["attention_mask"]
    rows, length = values.shape
    speed = 1 - SPEED_RANGE + 2 * SPEED_RANGE * torch.rand(rows, 1, generator=generator)
    position = torch.arange(length) * speed
    before = position.long()
    last = mask.sum(-1, keepdim=True) - 1
    part = position - before
    left = values.gather(1, torch.minimum(before, last))
    right = values.gather(1, torch.minimum(before + 1, last))
    inside = position <= last
    return {"input_values": torch.where(inside, left + part * (right - left), 0.0), "attention_mask": inside}


def padded(parts: Sequence[Clips]) -> tuple[Callable[[list[Any]], Any], int]:
    """``collate`` for all of ``parts``, and the length in frames: that of their longest clip."""
    length = max(len(clip) for part in parts for clip in part.clips)
    return functools.partial(collate, length=length), length
