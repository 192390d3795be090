"""Speech clips: decoding against the standard library, resampling, normalising, padding, speed."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from dynaprune.experiment.tasks.audio import (
    IGNORED,
    RATE,
    Clips,
    collate,
    decode,
    normalise,
    padded,
    perturb_speed,
    read_clip,
    resample,
)

pytest.importorskip("soundfile")
pytest.importorskip("soxr")


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """PCM16 bytes of ``samples [frames, channels]`` int16, written by the standard library."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def _by_wave(data: bytes) -> tuple[np.ndarray, int]:
    with wave.open(io.BytesIO(data)) as file:
        assert file.getsampwidth() == 2 and file.getnchannels() == 1
        return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()


def _tone(hertz: float, seconds: float, rate: int) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def _loudest(samples: np.ndarray, rate: int) -> float:
    """Frequency in Hz with the most energy."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * rate / len(samples))


def test_decoding_gives_the_bits_that_the_standard_library_gives(data_dir: Path) -> None:
    table = parquet.read_table(data_dir / "fsdd" / "test.parquet", columns=["audio"])
    for row in (0, 7, 299):
        data = table.column("audio")[row].as_py()["bytes"]
        wanted, rate = _by_wave(data)
        samples, found = decode(data)
        assert found == rate == 8000 and samples.dtype == np.float32
        assert np.array_equal(samples * 32768, wanted)


def test_channels_are_averaged() -> None:
    left = np.arange(-1000, 1000)
    samples, rate = decode(_wav(np.stack([left, 3 * left], axis=1), 22050))
    assert rate == 22050 and np.array_equal(samples * 32768, 2 * left)


def test_an_mp3_is_the_clip_that_another_decoder_and_resampler_made_of_it(data_dir: Path) -> None:
    """The 16 kHz WAV copies of the English clips were made with scipy's polyphase filter."""
    mp3 = parquet.read_table(data_dir / "common_voice" / "test.parquet", columns=["audio", "path"])
    wavs = parquet.read_table(data_dir / "common_voice" / "en_16k_test.parquet", columns=["audio", "path"])
    by_path = {p: a["bytes"] for p, a in zip(mp3["path"].to_pylist(), mp3["audio"].to_pylist(), strict=True)}
    for path, audio in list(zip(wavs["path"].to_pylist(), wavs["audio"].to_pylist(), strict=True))[:2]:
        wanted, rate = _by_wave(audio["bytes"])
        samples, own = decode(by_path[path])
        found = resample(samples, own, rate)
        assert rate == RATE != own and abs(len(found) - len(wanted)) <= 1
        length = min(len(found), len(wanted))
        assert np.corrcoef(found[:length], wanted[:length])[0, 1] > 0.999


@pytest.mark.parametrize(("rate", "target"), [(8000, 16000), (48000, 16000), (44100, 16000)])
def test_resampling_keeps_duration_pitch_and_energy(rate: int, target: int) -> None:
    tone = _tone(1000, 0.5, rate)
    found = resample(tone, rate, target)
    assert found.dtype == np.float32 and abs(len(found) - 0.5 * target) <= 1
    assert abs(_loudest(found, target) - 1000) < 5
    inner = slice(target // 20, -target // 20)
    assert np.mean(found[inner] ** 2) == pytest.approx(0.5, rel=0.01)
    assert resample(tone, rate, rate) is tone


def test_resampling_down_removes_what_would_alias() -> None:
    found = resample(_tone(11000, 0.5, 48000), 48000)
    assert np.mean(found[800:-800] ** 2) < 1e-6


def test_normalising_is_what_the_feature_extractor_of_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    clip = (3 + 0.01 * np.random.default_rng(0).standard_normal(5000)).astype(np.float32)
    wanted = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)(clip, sampling_rate=RATE)
    assert np.allclose(normalise(clip), wanted["input_values"][0], atol=1e-5)
    assert normalise(clip).std() == pytest.approx(1, abs=1e-3)
    assert np.array_equal(normalise(np.zeros(100, np.float32)), np.zeros(100))


def test_a_clip_is_cut_then_normalised() -> None:
    loud_after = np.concatenate([_tone(300, 0.5, 8000), 30 * _tone(300, 0.5, 8000)])
    data = _wav((1000 * loud_after[:, None]).astype(np.int16), 8000)
    clip = read_clip(data, 0.4)
    assert clip.shape == (round(0.4 * RATE),) and clip.dtype == torch.float32
    assert clip.std() == pytest.approx(1, abs=0.01)
    assert read_clip(data, 9.0).shape == (RATE,)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"no sound at all", "cannot read"), (_wav(np.zeros((100, 1), np.int16), 8000), r"0\.013 s")],
)
def test_what_is_no_clip_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_clip(data, 1.0)


def test_a_batch_is_filled_up_with_zeros_and_masked() -> None:
    clips = Clips([torch.ones(3), 2 * torch.ones(5)], [7, 1])
    make, length = padded([clips, Clips([torch.ones(4)], [0])])
    inputs, targets = make([clips[0], clips[1]])
    assert length == 5 and targets.tolist() == [7, 1] and targets.dtype == torch.int64
    assert inputs["input_values"].tolist() == [[1, 1, 1, 0, 0], [2, 2, 2, 2, 2]]
    assert inputs["attention_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    symbols = [(torch.ones(2), torch.tensor([4, 5, 6])), (torch.ones(2), torch.tensor([9]))]
    assert collate(symbols, 2)[1].tolist() == [[4, 5, 6], [9, IGNORED, IGNORED]]


def test_speed_moves_pitch_and_length_together_and_depends_on_the_generator_alone() -> None:
    tone = torch.from_numpy(_tone(500, 0.5, RATE))
    inputs, _ = collate([(tone, 0)] * 16, RATE)
    before = {name: t.clone() for name, t in inputs.items()}
    found = perturb_speed(inputs, torch.Generator().manual_seed(3))
    again = perturb_speed(inputs, torch.Generator().manual_seed(3))
    for name in inputs:
        assert torch.equal(inputs[name], before[name]) and torch.equal(found[name], again[name])
    speeds = []
    for values, mask in zip(found["input_values"], found["attention_mask"], strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not values[length:].any()
        speeds.append(len(tone) / length)
        assert _loudest(values[:length].numpy(), RATE) == pytest.approx(500 * speeds[-1], abs=4)
    assert 0.85 <= min(speeds) < 0.93 and 1.07 < max(speeds) <= 1.151
