"""The task imdb: vocabulary, samples, splits, pretraining and both arms, on small text and real reviews."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dynaprune.experiment.run_config import RunConfig, resolve
from dynaprune.experiment.state_files import Identity, StateFiles
from dynaprune.experiment.tasks import Split, get_task
from dynaprune.experiment.tasks.data import split_train
from dynaprune.experiment.tasks.text import (
    SPECIAL,
    Texts,
    collate,
    drop_words,
    encode,
    tokenizer_of,
    train_vocabulary,
)
from dynaprune.experiment.train import CannotStart, run_arm
from tests.experiment.killed import Killed, differences_when_killed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

SMALL: dict[str, Any] = {"size": "tiny", "max_length": 24, "train_samples": 64}
_GOOD = "a warm and clever film with wonderful actors i loved every minute of it"
_BAD = "dull plot and wooden acting made this a tedious waste of two hours"


def reviews(rows: int, seed: int) -> pyarrow.Table:
    """Sentences whose words tell their label, with markup, accents and a length that varies."""
    draw = np.random.default_rng(seed)
    texts, labels = [], []
    for row in range(rows):
        words = (_GOOD if row % 2 else _BAD).split()
        chosen = draw.choice(words, size=int(draw.integers(5, 60)))
        texts.append("Café<br /><br />" + " ".join(chosen) + "!")
        labels.append(row % 2)
    return pyarrow.table({"text": texts, "label": labels})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 400 and 60 made-up reviews."""
    root = tmp_path_factory.mktemp("data")
    (root / "imdb").mkdir()
    for part, rows in (("train", 400), ("test", 60)):
        parquet.write_table(reviews(rows, rows), root / "imdb" / f"{part}.parquet")
    return root


def loaded(folder: Path, seed: int = 0, **options: Any) -> Any:
    task = get_task("imdb")
    return task.load(Split(seed, source=str(folder)), {**task.options, **SMALL, **options})


def test_the_vocabulary_depends_on_the_texts_alone() -> None:
    texts = [_GOOD, _BAD, "Ünïcode ünïcode words, words!"] * 30
    first = train_vocabulary(texts, 90)
    assert all(train_vocabulary(texts, 90) == first for _ in range(4))
    assert first[:5] == list(SPECIAL) and first[5:] == sorted(first[5:])
    assert len(first) == len(set(first)) <= 90
    assert train_vocabulary([*texts, "zebra zebra zebra " * 30], 90) != first
    tokens = tokenizer_of(first).tokenize("Clever ünicode film")
    assert "[UNK]" not in tokens and "".join(tokens).replace("##", "") == "cleverunicodefilm"


def test_the_tokenizer_of_a_vocabulary_is_berts() -> None:
    vocabulary = train_vocabulary([_GOOD, _BAD] * 20, 120)
    ours = tokenizer_of(vocabulary)
    theirs = transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)})
    text = "Wonderful, CLEVER acting; loved it!"
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert encode(ours, [text])[0].tolist() == expected
    assert (ours.pad_token_id, ours.mask_token_id) == (theirs.pad_token_id, theirs.mask_token_id)


def test_samples_are_head_and_tail_between_special_tokens() -> None:
    tokenizer = tokenizer_of(train_vocabulary([_GOOD, _BAD] * 20, 120))
    tokens = [np.arange(10, 10 + n, dtype=np.int32) for n in (3, 30, 14, 1)]
    labels = np.array([1, 0, 1, 0])
    padded = Texts(tokens, labels, tokenizer, 16, padded=True)
    start, end, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    short, label = padded[0]
    assert short["input_ids"].tolist() == [start, 10, 11, 12, end] + [pad] * 11 and int(label) == 1
    assert short["attention_mask"].tolist() == [1] * 5 + [0] * 11
    assert padded[1][0]["input_ids"].tolist() == [start, 10, 11, 12, *range(29, 40), end]
    assert padded[2][0]["input_ids"].tolist() == [start, *range(10, 24), end]
    loose = Texts(tokens, labels, tokenizer, 16, padded=False)
    batch, found = collate([loose[0], loose[3]])
    assert batch["input_ids"].tolist() == [[start, 10, 11, 12, end], [start, 10, end, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]] and found.tolist() == [1, 0]
    with pytest.raises(ValueError, match="at least 8"):
        Texts(tokens, labels, tokenizer, 7, padded=True)


def test_padding_changes_no_logits(folder: Path) -> None:
    data = loaded(folder)
    torch.manual_seed(0)
    model = get_task("imdb").build_model(data, 0.5).eval()
    lengths = [int(data.train[i][0]["attention_mask"].sum()) for i in range(64)]
    short, full = data.train[int(np.argmin(lengths))][0], data.train[int(np.argmax(lengths))][0]
    assert min(lengths) < max(lengths) == 24
    alone = {name: each[None, : min(lengths)] for name, each in short.items()}
    beside = {name: torch.stack([each, full[name]]) for name, each in short.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**alone).logits[0], model(**beside).logits[0], rtol=1e-5, atol=1e-6)


def test_the_test_part_is_official_and_in_the_order_of_length(folder: Path) -> None:
    data = loaded(folder)
    assert data.description["sizes"] == [64, 10, 60]
    lengths = [int(data.test[i][0]["attention_mask"].sum()) for i in range(60)]
    assert lengths == sorted(lengths) and max(lengths) == 24
    assert all(len(data.train[i][0]["input_ids"]) == 24 for i in range(64))
    assert sorted(data.test.labels.tolist()) == [0] * 30 + [1] * 30


def test_the_vocabulary_sees_no_validation_or_test_text(folder: Path, tmp_path: Path) -> None:
    table = parquet.read_table(folder / "imdb" / "train.parquet")
    used = split_train(table.column("label").to_numpy(), Split(0), 64)[0]
    texts = table.column("text").to_pylist()
    spoiled = [text if row in used else "zzyzx " * 40 for row, text in enumerate(texts)]
    (tmp_path / "imdb").mkdir()
    for part, changed in (("train", spoiled), ("test", ["zzyzx " * 40] * 60)):
        labels = parquet.read_table(folder / "imdb" / f"{part}.parquet").column("label")
        parquet.write_table(
            pyarrow.table({"text": changed, "label": labels}), tmp_path / "imdb" / f"{part}.parquet"
        )
    before, after = loaded(folder), loaded(tmp_path)
    assert before.description["vocabulary"] == after.description["vocabulary"]
    assert all(
        torch.equal(before.train[i][0]["input_ids"], after.train[i][0]["input_ids"]) for i in range(64)
    )


def test_both_arms_start_alike_and_only_the_baseline_drops(folder: Path) -> None:
    task, data = get_task("imdb"), loaded(folder)
    models = []
    for dropout in (0.0, 0.3):
        torch.manual_seed(5)
        models.append(task.build_model(data, dropout).train())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    rates = [{m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} for model in models]
    assert rates == [{0.0}, {0.0, 0.3}]
    inputs, targets = collate([data.train[i] for i in range(5)])
    losses = task.losses(task.forward(models[0], inputs), targets)
    assert losses.shape == (5,)
    assert task.score([1, 1, 0, 0], [1, 0, 0, 0]) == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}


def test_masked_language_loss_is_the_librarys(folder: Path) -> None:
    from dynaprune.experiment.tasks.masked_language import blocks_of_text, masked_language_loss

    data = loaded(folder)
    blocks = blocks_of_text(data.train)
    assert blocks.shape[1] == 24 and (blocks[:, 0] == data.train.start).all()
    stream = np.concatenate([np.append(data.train.text(i), data.train.end) for i in range(64)])
    assert np.array_equal(blocks[:, 1:].reshape(-1), stream[: blocks.shape[0] * 23])
    model = transformers.BertForMaskedLM(data.model_config).eval()
    mask = transformers.DataCollatorForLanguageModeling(data.tokenizer, mlm_probability=0.15, seed=1)
    batch = dict(mask([{"input_ids": row} for row in blocks[:8]]))
    with torch.no_grad():
        torch.testing.assert_close(masked_language_loss(model, batch), model(**batch).loss)


def test_pretraining_moves_the_encoder_the_same_way_for_both_arms(folder: Path) -> None:
    task, data = get_task("imdb"), loaded(folder)
    config = RunConfig(task="imdb", batch_size=16, options={**data.options, "pretrain_epochs": 3})
    encoders, said = [], []
    for dropout in (0.0, 0.4):
        torch.manual_seed(2)
        model = task.build_model(data, dropout).train()
        fresh = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
        assert task.pretrain is not None
        said.append(task.pretrain(model, data, config, torch.device("cpu"), None))
        assert said[-1].pop("pretrain_seconds") > 0
        assert not torch.equal(fresh, model.bert.encoder.layer[0].output.dense.weight)
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        encoders.append(model.state_dict())
    assert said[0] == said[1] and said[0]["pretrain_loss_last"] < said[0]["pretrain_loss_first"] - 0.2
    assert all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())
    json.dumps(said)


class _Cut(StateFiles):
    def write(self, number: int, state: Mapping[str, Any]) -> None:
        super().write(number, state)
        if number in (2, 9, 14):
            raise Killed


def test_a_pretraining_that_was_cut_short_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """In the middle of an epoch of seven steps, and at the end of one."""
    task, data = get_task("imdb"), loaded(folder)
    config = RunConfig(task="imdb", batch_size=16, options={**data.options, "pretrain_epochs": 3})
    assert task.pretrain is not None

    def pretrained(states: StateFiles | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        torch.manual_seed(2)
        model = task.build_model(data, 0.0).train()
        torch.manual_seed(torch.seed())
        assert task.pretrain is not None
        said = task.pretrain(model, data, config, torch.device("cpu"), states)
        assert said.pop("pretrain_seconds") > 0
        return model.state_dict(), said

    whole, said = pretrained(None)
    assert said["pretrain_steps"] == 21
    identity = Identity("baseline", config, "data")
    environment = {"versions": {"dynaprune": "1"}}
    for _ in range(3):
        states = _Cut(tmp_path, "pretrain", identity, environment, every_seconds=0)
        with pytest.raises(Killed):
            pretrained(states)
    found, again = pretrained(StateFiles(tmp_path, "pretrain", identity, environment, every_seconds=1000))
    assert again == said and all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_comparison_learns_prunes_and_is_saved(folder: Path, tmp_path: Path) -> None:
    import dynaprune

    config = resolve(
        "imdb",
        options={**SMALL, "train_samples": 256, "pretrain_epochs": 1},
        data=str(folder),
        epochs=4,
        batch_size=16,
        lr=2e-3,
        warmup_steps=4,
        calibration_samples=128,
        seed=1,
    )
    shared = tmp_path / "pretrained.safetensors"
    arms = {
        arm: run_arm(config, arm, tmp_path / arm, quiet=True, pretrained=shared)
        for arm in ("baseline", "pruned")
    }
    parts = {"kills": (9, 40), "pretrained": shared}
    assert differences_when_killed(config, "pruned", tmp_path / "pruned", tmp_path / "cut", **parts) == []
    assert arms["baseline"]["pretrain_loss_last"] == arms["pruned"]["pretrain_loss_last"]
    assert arms["baseline"]["test_accuracy"] > 0.9 and arms["pruned"]["test_accuracy"] > 0.8
    assert arms["pruned"]["target_reached"] and arms["pruned"]["sparsity"] >= 0.7
    assert arms["pruned"]["flops_per_step_last"] < 0.7 * arms["baseline"]["flops_per_step_last"]
    assert arms["baseline"]["flops_per_step_first"] == arms["pruned"]["flops_per_step_first"]
    exempt = {
        n: layer["exempt"] for n, layer in arms["pruned"]["pruner"]["layers"].items() if layer["exempt"]
    }
    embeddings = {f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")}
    assert set(exempt) == {"bert.pooler.dense", "classifier", *embeddings}
    data = loaded(folder, seed=1, train_samples=256)
    task = get_task("imdb")
    model = dynaprune.load(lambda: task.build_model(data, 0.0), tmp_path / "pruned" / "model.safetensors")
    inputs, targets = collate([data.test[i] for i in range(60)])
    with torch.no_grad():
        found = task.forward(model.eval(), inputs).argmax(1)
    assert float((found == targets).double().mean()) == pytest.approx(arms["pruned"]["test_accuracy"])


def test_a_local_folder_starts_from_its_weights_and_nothing_falls_back(folder: Path, tmp_path: Path) -> None:
    from dynaprune.experiment.tasks.imdb import HUB_MODEL, pretrained_folder

    data = loaded(folder)
    source = transformers.BertForMaskedLM(data.model_config)
    saved = tmp_path / "bert"
    source.save_pretrained(saved)
    with pytest.raises(ValueError, match=r"lacks tokenizer.json or vocab.txt"):
        pretrained_folder(str(saved))
    data.tokenizer.save_pretrained(saved)
    again = loaded(folder, init=str(saved))
    model = get_task("imdb").build_model(again, 0.25)
    assert torch.equal(
        model.bert.encoder.layer[1].output.dense.weight, source.bert.encoder.layer[1].output.dense.weight
    )
    assert model.config.hidden_dropout_prob == 0.25 and model.config.attention_probs_dropout_prob == 0.0
    assert torch.equal(again.train[3][0]["input_ids"], data.train[3][0]["input_ids"])
    with pytest.raises(ValueError, match="max_length must be from 8 to the model's 24"):
        loaded(folder, init=str(saved), max_length=25)
    with pytest.raises(ValueError, match="scratch, pretrained or an existing folder, got 'nowhere'"):
        loaded(folder, init="nowhere")
    with pytest.raises(ValueError, match="size must be one of tiny, small, base"):
        loaded(folder, size="huge")
    with pytest.raises(ValueError, match="official test part"):
        get_task("imdb").load(Split(0, 0, 5, str(folder)), {**get_task("imdb").options})
    assert HUB_MODEL.endswith("bert-base-uncased")


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    config = resolve("imdb", options={**SMALL, "init": "pretrained"}, data=str(folder))
    with pytest.raises(CannotStart, match=r"no route to host.*--init a local folder.*--init scratch"):
        run_arm(config, "baseline", tmp_path / "out", quiet=True)


def test_the_presets() -> None:
    original = resolve("imdb", preset="trainer-original")
    assert (original.epochs, original.lr, original.warmup_steps) == (3, 3e-5, 500)
    assert (original.weight_decay, original.batch_size, original.optimizer) == (0.01, 16, "adamw")
    assert original.options["init"] == "pretrained" and original.schedule == "linear"
    paper = resolve("imdb", preset="paper")
    assert (paper.optimizer, paper.lr, paper.dropout, paper.schedule) == ("adam", 1e-3, 0.5, "constant")


def test_real_reviews_and_the_base_model(data_dir: Path) -> None:
    """BERT-base's own vocabulary where the folder has it, and as many parameters as it is known to have."""
    from dynaprune.experiment.tasks.imdb import _columns, _from_scratch, clean

    texts, labels, _ = _columns(str(data_dir), "test")
    assert len(texts) == 25_000 and labels.sum() == 12_500 and clean("a<br /><br />b") == "a  b"
    config, tokenizer, vocabulary = _from_scratch("base", [], str(data_dir), 384)
    assert (
        vocabulary["origin"] == "hf_configs/bert-base-uncased/vocab.txt" and vocabulary["entries"] == 30_522
    )
    assert encode(tokenizer, ["hello world"])[0].tolist() == [7592, 2088]
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    assert sum(p.numel() for p in model.parameters()) == 109_483_778


def test_dropped_words_are_only_hidden_from_attention_and_only_in_training(folder: Path) -> None:
    data = loaded(folder)
    assert data.augment is drop_words
    mask = torch.ones(64, 384, dtype=torch.int64)
    mask[:, 300:] = 0
    batch = {"input_ids": torch.arange(64 * 384).view(64, 384), "attention_mask": mask}
    seen, again, other = (drop_words(batch, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    kept = seen["attention_mask"]
    assert torch.equal(seen["input_ids"], batch["input_ids"]) and int(mask.sum()) == 64 * 300
    assert kept[:, 0].all() and not kept[:, 300:].any() and kept.dtype == torch.int64
    assert float(kept[:, 1:300].double().mean()) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(kept, again["attention_mask"]) and not torch.equal(kept, other["attention_mask"])
