"""The speech tasks: masks, CTC, error rates, where the weights come from, what is pruned, both arms."""

from __future__ import annotations

import io
import itertools
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet

import dynaprune
from dynaprune.experiment.run_config import resolve
from dynaprune.experiment.tasks import Split, get_task, wav2vec2
from dynaprune.experiment.tasks.audio import IGNORED, RATE, collate
from dynaprune.experiment.tasks.ctc import (
    BLANK,
    SPACE,
    UNKNOWN,
    encode,
    error_rates,
    greedy,
    losses_per_symbol,
    plain_text,
    vocabulary,
)
from dynaprune.experiment.train import CannotStart, run_arm
from tests.experiment.killed import differences_when_killed
from tests.rounding import agree

for _name in ("transformers", "soundfile", "soxr", "jiwer"):
    pytest.importorskip(_name)

TINY = {"init": "scratch", "size": "tiny"}
LANGUAGES = ("aa", "bb")
WORDS = ("ab", "ba c")


def _tones(seconds: float, hertz: float, seed: int) -> bytes:
    """A WAV of a tone in noise."""
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * 8000)) / 8000
    samples = np.sin(2 * np.pi * hertz * time) + 0.1 * draw.standard_normal(len(time))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((8000 * samples).astype("<i2").tobytes())
    return buffer.getvalue()


def _write(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which every class (and every word) is a tone of its own: quick to learn."""
    folder = tmp_path_factory.mktemp("tones")
    for part, rows in (("train", 160), ("test", 20)):
        sounds = [
            {"bytes": _tones(0.12 + 0.01 * (i % 7), 200 * 1.25 ** (i % 10), i), "path": None}
            for i in range(rows)
        ]
        _write(folder / "fsdd" / f"{part}.parquet", {"audio": sounds, "label": [i % 10 for i in range(rows)]})
        twos = [
            {"bytes": _tones(0.12 + 0.01 * (i % 7), 300 + 600 * (i % 2), i), "path": ""} for i in range(rows)
        ]
        columns = {
            "audio": twos,
            "locale": [LANGUAGES[i % 2] for i in range(rows)],
            "sentence": [WORDS[i % 2].upper() + "!" for i in range(rows)],
        }
        _write(folder / "common_voice" / f"{part}.parquet", columns)
    return folder


def _clips(*seconds: float) -> list[torch.Tensor]:
    return [torch.randn(round(s * RATE)) for s in seconds]


@pytest.mark.parametrize("kind", ["sequence", "ctc"])
def test_a_padded_batch_gives_what_its_clips_give_alone(kind: str) -> None:
    model = wav2vec2.build(kind, TINY, 12, 0.0).eval()
    clips = _clips(0.31, 0.5, 0.2)
    batch, _ = collate([(clip, 0) for clip in clips], RATE)
    with torch.no_grad():
        together = wav2vec2.logits(model, batch)
        unmasked = model(batch["input_values"]).logits
        frames = wav2vec2.feature_frames(model, batch).tolist()
        for row, clip in enumerate(clips):
            inputs, _ = collate([(clip, 0)], len(clip))
            alone = wav2vec2.logits(model, inputs)[0]
            if kind == "ctc":
                assert alone.shape[0] == frames[row]
                masked, without = together[row, : frames[row]], unmasked[row, : frames[row]]
            else:
                masked, without = together[row], unmasked[row]
            assert torch.allclose(masked, alone, atol=1e-5)
            assert not torch.allclose(without, alone, atol=1e-3)


def test_a_model_with_group_norm_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {**wav2vec2.SIZES["tiny"], "feat_extract_norm": "group"}
    monkeypatch.setitem(wav2vec2.SIZES, "group", group)
    model = wav2vec2.build("sequence", {**TINY, "size": "group"}, 3, 0.0).eval()
    batch, _ = collate([(clip, 0) for clip in _clips(0.3, 0.4)], RATE // 2)
    with torch.no_grad():
        assert agree(wav2vec2.logits(model, batch), model(batch["input_values"]).logits)


def _spelled_probability(probabilities: torch.Tensor, symbols: list[int]) -> float:
    """Sum over all paths that collapse to ``symbols``, one by one."""
    total = 0.0
    for path in itertools.product(range(probabilities.shape[1]), repeat=probabilities.shape[0]):
        merged = [s for i, s in enumerate(path) if i == 0 or s != path[i - 1]]
        if [s for s in merged if s != BLANK] == symbols:
            total += math.prod(float(probabilities[t, s]) for t, s in enumerate(path))
    return total


def test_ctc_losses_are_those_of_torch_and_of_the_sum_over_all_paths() -> None:
    logits = torch.randn(3, 5, 4, requires_grad=True)
    frames = torch.tensor([5, 4, 3])
    spelled = [[1, 1], [2, 3, 1], [2]]
    targets = torch.full((3, 3), IGNORED)
    for row, symbols in enumerate(spelled):
        targets[row, : len(symbols)] = torch.tensor(symbols)
    losses = losses_per_symbol(logits, frames, targets)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    for row, symbols in enumerate(spelled):
        alone = logits[row, : frames[row]].log_softmax(-1)
        wanted = F.ctc_loss(
            alone, torch.tensor(symbols), frames[row], torch.tensor(len(symbols)), reduction="sum"
        )
        assert losses[row].item() == pytest.approx(wanted.item() / len(symbols), rel=1e-5)
        by_path = -math.log(_spelled_probability(alone.detach().double().exp(), symbols)) / len(symbols)
        assert losses[row].item() == pytest.approx(by_path, rel=1e-5)
    losses.sum().backward()
    assert logits.grad is not None and not logits.grad[2, 3:].any() and logits.grad[2, :3].any()
    assert torch.allclose(losses_per_symbol(logits.bfloat16(), frames, targets), losses, rtol=0.02)


def test_a_text_that_does_not_fit_into_its_frames_is_refused() -> None:
    logits, targets = torch.randn(1, 3, 4), torch.tensor([[2, 2]])
    assert torch.isfinite(losses_per_symbol(logits, torch.tensor([3]), targets)).all()
    with pytest.raises(ValueError, match="2 frames for 2 symbols"):
        losses_per_symbol(logits, torch.tensor([2]), targets)


def test_greedy_decoding_merges_then_drops_blanks_within_the_frames() -> None:
    best = torch.tensor([[3, 3, 0, 3, 4, 4, 0], [0, 0, 5, 5, 1, 6, 6]])
    logits = F.one_hot(best, 7).float()
    assert greedy(logits, torch.tensor([7, 4])) == [[3, 3, 4], [5]]


def test_texts_become_symbols_of_the_training_transcripts() -> None:
    assert plain_text("  \u201cL\u2019été, déjà?\u201d \u2014 'Tis A-B 5% ") == "l'été déjà tis a b 5"
    assert plain_text("e\u0301") == "é" and plain_text("... !") == ""
    characters = vocabulary(["ba c", "ab"])
    assert characters == ["a", "b", "c"]
    assert encode("cab bé", characters).tolist() == [5, 3, 4, SPACE, 4, UNKNOWN]


def test_error_rates_are_those_of_the_texts() -> None:
    import jiwer

    truth, guess = ["the cat sat", "on a mat", "so"], ["the cat at", "on mat mat now", ""]
    characters = vocabulary(truth + guess)

    def symbols(texts: list[str]) -> list[list[int]]:
        return [encode(text, characters).tolist() for text in texts]

    padded = [s + [IGNORED] * (20 - len(s)) for s in symbols(truth)]
    found = error_rates(padded, symbols(guess))
    assert found["wer"] == pytest.approx(jiwer.wer(truth, guess)) == pytest.approx(4 / 7)
    assert found["cer"] == pytest.approx(jiwer.cer(truth, guess))
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["f1"] == pytest.approx(2 * (4 / 7) * (4 / 7) / (8 / 7))
    silent = error_rates(padded, [[], [], []])
    assert silent == {"accuracy": 0.0, "f1": 0.0, "wer": 1.0, "cer": 1.0}


def test_the_initial_weights_do_not_depend_on_dropout_and_a_folder_gives_them_back(tmp_path: Path) -> None:
    models = []
    for dropout in (0.0, 0.3):
        torch.manual_seed(2)
        models.append(wav2vec2.build("sequence", TINY, 10, dropout))
    first, other = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(p, other[name]) for name, p in first.items())
    assert models[1].config.hidden_dropout == 0.3 and models[1].config.layerdrop == 0

    models[0].save_pretrained(tmp_path)  # type: ignore[operator]
    again = wav2vec2.build("ctc", {"init": str(tmp_path), "size": ""}, 17, 0.1)
    assert again.lm_head.weight.shape == (17, 32) and again.config.attention_dropout == 0.1  # type: ignore[union-attr]
    body = dict(again.named_parameters())
    assert all(torch.equal(p, body[name]) for name, p in first.items() if name.startswith("wav2vec2."))


def test_weights_that_cannot_be_had_are_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    import transformers

    model = wav2vec2.build("sequence", TINY, 10, 0.0)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["wav2vec2.encoder.layers.1.attention.q_proj.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.q_proj\.weight \(1 tensors"):
        wav2vec2.build("sequence", {"init": str(tmp_path), "size": ""}, 10, 0.0)
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        wav2vec2.build("sequence", {"init": str(tmp_path), "size": ""}, 10, 0.0)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(transformers.Wav2Vec2ForCTC, "from_pretrained", refuse)
    with pytest.raises(ConnectionError, match=r"wav2vec2-base.*--init FOLDER.*--init scratch"):
        wav2vec2.build("ctc", {"init": "pretrained", "size": ""}, 10, 0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": "scratch", "size": "huge"}, "tiny, small, base"),
        ({"init": "nowhere", "size": ""}, "'nowhere', which is no folder"),
        ({"init": "pretrained", "size": "tiny"}, "size belongs to --init scratch"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wav2vec2.check_options(options)


def test_base_is_the_published_architecture(data_dir: Path) -> None:
    from transformers import Wav2Vec2Config

    published = Wav2Vec2Config.from_pretrained(data_dir / "hf_configs" / "wav2vec2-base").to_dict()
    ours = Wav2Vec2Config(**wav2vec2.SIZES["base"]).to_dict()
    sizes = ("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm", "hidden_size")
    sizes += ("num_hidden_layers", "num_attention_heads", "intermediate_size", "do_stable_layer_norm")
    sizes += ("num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "hidden_act", "layer_norm_eps")
    for key in sizes:
        value = ours[key]
        assert (list(value) if isinstance(value, tuple) else value) == published[key]


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_what_is_pruned_of_a_wav2vec2_and_what_stays_with_the_reason(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {**wav2vec2.SIZES["tiny"], "feat_extract_norm": norm, "conv_bias": norm == "layer"}
    monkeypatch.setitem(wav2vec2.SIZES, "under test", size)
    model = wav2vec2.build("sequence", {**TINY, "size": "under test"}, 4, 0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch, targets = collate([(clip, i % 4) for i, clip in enumerate(_clips(*[0.3, 0.2] * 4))], RATE // 3)
    config = dynaprune.PruningConfig(target_sparsity=0.85, block_size=8, total_steps=24, floor=0.0)
    example = {name: t[:2] for name, t in batch.items()}
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=example)
    convolutions = [f"wav2vec2.feature_extractor.conv_layers.{i}.conv" for i in range(3)]
    assert set(convolutions[1:]) < set(pruner.layers)
    assert sum("encoder.layers." in name for name in pruner.layers) == 12
    reasons = {name: said["exempt"] for name, said in pruner.report()["layers"].items() if said["exempt"]}
    assert set(reasons) == {convolutions[0], "wav2vec2.encoder.pos_conv_embed.conv", "classifier"}
    assert "parametrized" in reasons["wav2vec2.encoder.pos_conv_embed.conv"]
    assert "first convolution" in reasons[convolutions[0]]

    losses = []
    for _ in range(24):
        optimizer.zero_grad()
        loss = F.cross_entropy(wav2vec2.logits(model, batch), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert pruner.target_reached and all(math.isfinite(x) for x in losses)
    report = pruner.report()
    assert report["neurons_removed"] > 0
    refused = report["neurons_refused"]
    in_the_way = "layer_norm" if norm == "layer" else "GroupNorm"
    assert in_the_way in refused[convolutions[0]]
    assert (convolutions[1] in refused) == (norm == "layer")
    model.eval()
    with torch.no_grad():
        before = wav2vec2.logits(model, batch)
        pruner.finalize()
        assert torch.allclose(wav2vec2.logits(model, batch), before, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        pytest.param("spoken_digits", {}, id="digits"),
        pytest.param("common_voice", {"objective": "language"}, id="language"),
        pytest.param("common_voice", {"objective": "ctc"}, id="ctc"),
    ],
)
def test_both_arms_train_and_report(task: str, options: dict[str, Any], tones: Path, tmp_path: Path) -> None:
    config = resolve(
        task,
        options={"size": "tiny", **options},
        data=str(tones),
        device="cpu",
        epochs=4,
        batch_size=28,
        lr=3e-3,
        warmup_steps=2,
        block_size=8,
        target_sparsity=0.5,
        calibration_samples=64,
    )
    for arm in ("baseline", "pruned"):
        result = run_arm(config, arm, tmp_path / arm, quiet=True)
        rows = (tmp_path / arm / "history.csv").read_text().splitlines()
        column = rows[0].split(",").index("train_loss")
        losses = [float(row.split(",")[column]) for row in rows[1:]]
        assert result["steps"] == 20 and losses[-1] < 0.9 * losses[0]
        assert 0 <= result["test_accuracy"] <= 1 and 0 <= result["test_f1"] <= 1
        assert result["data"]["sizes"] == [140, 20, 20] and "chance_accuracy" in result["data"]
        if options.get("objective") == "ctc":
            assert result["test_wer"] >= 0 and result["test_cer"] >= 0
            assert result["data"]["characters"] == "abc"
    assert result["target_reached"] and result["flops_per_step_last"] < result["flops_per_step_first"]
    cut = tmp_path / "cut"
    assert differences_when_killed(config, "pruned", tmp_path / "pruned", cut, kills=(8,)) == []


def test_weights_that_cannot_be_had_stop_a_run_with_the_reason(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(transformers.Wav2Vec2ForSequenceClassification, "from_pretrained", refuse)
    config = resolve("spoken_digits", options={"init": "pretrained"}, data=str(tones), device="cpu")
    with pytest.raises(CannotStart, match="--init scratch"):
        run_arm(config, "baseline", tmp_path / "out", quiet=True)


def test_common_voice_needs_a_folder_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNAPRUNE_DATA", raising=False)
    task = get_task("common_voice")
    with pytest.raises(ValueError, match="Mozilla Data Collective"):
        task.load(Split(0), task.options)
    with pytest.raises(ValueError, match="language, ctc"):
        task.load(Split(0), {**task.options, "objective": "speaker"})


def test_clips_too_long_for_their_text_are_left_out_and_counted(tones: Path) -> None:
    task = get_task("common_voice")
    split = Split(0, source=str(tones))
    whole = task.load(split, {**task.options, "objective": "ctc"}).description
    short = task.load(split, {**task.options, "objective": "ctc", "max_seconds": 0.145}).description
    assert whole["left_out"] == 0 and whole["seconds"] == pytest.approx(0.18)
    assert short["left_out"] + sum(short["sizes"]) == sum(whole["sizes"]) == 180
    assert short["left_out"] > 0 and short["seconds"] <= 0.145
    cut = task.load(split, {**task.options, "max_seconds": 0.145}).description
    assert cut["sizes"] == whole["sizes"] and cut["seconds"] == 0.145
    assert cut["chance_accuracy"] == 0.5 and "0.50" in cut["note"]


def test_spoken_digits_are_the_official_recordings(data_dir: Path) -> None:
    task = get_task("spoken_digits")
    data = task.load(Split(0, source=str(data_dir)), {**task.options, "train_samples": 100})
    assert data.description["sizes"] == [100, 15, 300]
    assert np.bincount(data.test.targets).tolist() == [30] * 10  # type: ignore[attr-defined]
    assert np.bincount(data.train.targets).tolist() == [10] * 10  # type: ignore[attr-defined]
    lengths = [len(clip) for clip in data.test.clips]  # type: ignore[attr-defined]
    assert max(lengths) == round(0.7 * RATE) == round(data.description["seconds"] * RATE)
    assert 0.3 * RATE < np.median(lengths) < 0.6 * RATE
