"""The task lm: parts, blocks, losses, FLOPs, the best epoch, and both arms on made-up reviews."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch import nn
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment import epochs
from dynaprune.experiment.metrics import flops_of
from dynaprune.experiment.paired import of_seeds
from dynaprune.experiment.progress import EpochProgress
from dynaprune.experiment.report import build_report
from dynaprune.experiment.run_config import RunConfig, resolve
from dynaprune.experiment.saved_results import read_report
from dynaprune.experiment.steps import evaluate
from dynaprune.experiment.summary import summarise
from dynaprune.experiment.summary_text import summary_markdown
from dynaprune.experiment.table import table_csv, table_markdown
from dynaprune.experiment.task_results import read_results
from dynaprune.experiment.tasks import Split, get_task
from dynaprune.experiment.tasks.llama import SIZES, Size, build, llama_config, logits
from dynaprune.experiment.tasks.lm import blocks_of, losses, score_of_loss, split_texts
from dynaprune.experiment.tasks.metric import ACCURACY, F1, NATS, PERPLEXITY, beside_the_loss
from dynaprune.experiment.train import run_arm
from dynaprune.experiment.write import write_json
from dynaprune.integrations.losses import per_sample_losses

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CPU = torch.device("cpu")
CONTEXT = 16
_SENTENCE = (
    "the film is a slow and clever film about nobody who walks through four streets of an old town while "
    "actors wait for a plot that comes late or not at all and the music never stops"
)


def reviews(rows: int, seed: int) -> list[str]:
    """Sentences of a few words, with markup, of a length that varies."""
    draw = np.random.default_rng(seed)
    found = []
    for row in range(rows):
        words = draw.choice(_SENTENCE.split(), size=int(draw.integers(20, 40)))
        found.append(f"Review {seed} {row}.<br /><br />" + " ".join(words) + "!")
    return found


def write(root: Path, train: list[str], test: list[str]) -> Path:
    (root / "imdb").mkdir()
    for part, texts in (("train", train), ("test", test)):
        parquet.write_table(pyarrow.table({"text": texts}), root / "imdb" / f"{part}.parquet")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 120 and 60 made-up reviews."""
    return write(tmp_path_factory.mktemp("data"), reviews(120, 0), reviews(60, 1))


def loaded(folder: Path, seed: int = 0, **options: Any) -> Any:
    task = get_task("lm")
    chosen = {**task.options, "size": "tiny", "context": CONTEXT, **options}
    return task.load(Split(seed, source=str(folder)), chosen)


def test_no_text_is_in_two_parts() -> None:
    train = [f"train {i}" for i in range(100)] + ["train 3"] * 5 + ["both"]
    test = [f"test {i}" for i in range(41)] + ["test 7", "both"]
    parts = split_texts(train, test, 0)
    assert [len(part) for part in parts] == [96, 5, 3]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert {*parts[0], *parts[1]} == set(train) and parts[2] == ["test 0", "test 20", "test 40"]
    again, other = split_texts(train, test, 0), split_texts(train, test, 1)
    assert again == parts and other[2] == parts[2]
    assert other[1] != parts[1] and set(other[0]) != set(parts[0])
    assert sorted(parts[0]) != parts[0]
    with pytest.raises(ValueError, match=r"at least two training texts .* got 1 and 0"):
        split_texts(["a", "a"], ["a"], 0)


def test_vocabulary_and_blocks_of_training_see_no_other_text(folder: Path, tmp_path: Path) -> None:
    data = loaded(folder)
    clean = [text.replace("<br />", " ") for text in reviews(120, 0)]
    held_out = set(split_texts(clean, ["x"], 0)[1])
    raw = [
        "zzyzx " * 30 + str(i) if text.replace("<br />", " ") in held_out else text
        for i, text in enumerate(reviews(120, 0))
    ]
    other = loaded(write(tmp_path, raw, ["zzyzx " * 30 + str(i) for i in range(60)]))
    assert other.description["vocabulary"] == data.description["vocabulary"]
    assert torch.equal(other.train.tensors[0], data.train.tensors[0])
    for part in ("validation", "test"):
        assert not torch.equal(getattr(other, part).tensors[0][:1], getattr(data, part).tensors[0][:1])
    text = data.tokenizer.decode(data.train.tensors[0].flatten().tolist())
    assert not any(each[:14] in text for each in held_out) and "<br" not in text


def test_every_token_is_predicted_once_from_those_before_it() -> None:
    stream = np.arange(100, 100 + 3 * 7 + 2, dtype=np.int32)
    data = blocks_of(stream, 7)
    tokens, targets = data.tensors
    assert len(data) == 3 and tokens.tolist() == [list(range(100 + 7 * i, 107 + 7 * i)) for i in range(3)]
    assert torch.equal(targets, tokens + 1)
    assert tokens.data_ptr() + 4 == targets.data_ptr()
    assert len(blocks_of(stream[:8], 7)) == 1
    with pytest.raises(ValueError, match="more than 7 tokens for a block, got 7"):
        blocks_of(stream[:7], 7)


class Copies(nn.Module):
    """Says that the token repeats, with logit 2 against 0."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries

    def forward(self, tokens: torch.Tensor) -> Any:
        scores = 2.0 * nn.functional.one_hot(tokens.long(), self.entries).float()
        return transformers.modeling_outputs.CausalLMOutput(logits=scores)


def test_a_model_that_repeats_the_last_token_is_right_as_often_as_tokens_repeat() -> None:
    entries = 5
    stream = torch.randint(0, entries, (4 * 8 + 1,), generator=torch.Generator().manual_seed(1)).int().numpy()
    found, scores = evaluate(get_task("lm"), Copies(entries), blocks_of(stream, 8), CPU)
    repeats = sum(int(a == b) for a, b in itertools.pairwise(stream))
    total = len(stream) - 1
    weight = math.exp(2) + entries - 1
    expected = repeats / total * math.log(weight / math.exp(2)) + (total - repeats) / total * math.log(weight)
    assert 0 < repeats < total
    assert found == scores["nats"] == pytest.approx(expected, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert score_of_loss(1e6)["perplexity"] == math.inf and math.isnan(score_of_loss(math.nan)["nats"])


def test_nats_are_the_cross_entropy_computed_token_by_token(folder: Path) -> None:
    data, task = loaded(folder), get_task("lm")
    model = task.build_model(data, 0.0).eval()
    for parameter in model.parameters():
        parameter.data *= 5  # far from a uniform guess
    model.double()
    total, count = 0.0, 0
    for tokens, targets in data.test:
        for end in range(len(tokens)):
            with torch.no_grad():
                scores = model(tokens[None, : end + 1]).logits[0, -1].tolist()
            total += math.log(sum(map(math.exp, scores))) - scores[int(targets[end])]
            count += 1
        if count >= 3 * CONTEXT:
            break
    few = torch.utils.data.Subset(data.test, range(3))
    model.float()
    assert count == 3 * CONTEXT
    assert evaluate(task, model, few, CPU)[0] == pytest.approx(total / count, rel=1e-5)
    assert abs(total / count - math.log(data.description["vocabulary"]["entries"])) > 0.5


def test_a_block_has_the_loss_of_the_library_and_of_the_integrations(folder: Path) -> None:
    """Their labels are the inputs, which the model shifts."""
    data, task = loaded(folder), get_task("lm")
    model = task.build_model(data, 0.0).eval()
    tokens = data.train.tensors[0][:4]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=data.tokenizer, pad_token="end of text", eos_token="end of text"
    )
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate([{"input_ids": each} for each in (tokens + (tokens == 0).int()).tolist()])
    ids = batch["input_ids"]
    with torch.no_grad():
        ours = losses(logits(model, ids[:, :-1]), ids[:, 1:])
        torch.testing.assert_close(model(**batch).loss, ours.mean())
        torch.testing.assert_close(per_sample_losses(model, dict(batch))[0], ours)
    assert ours.shape == (4,) and ours.dtype == torch.float32 and ours.std() > 0


@pytest.mark.parametrize(("size", "context"), [("tiny", 24), ("small", 16)])
def test_the_flops_of_a_step_are_those_of_a_hand_computation(size: str, context: int) -> None:
    """Forward: two per weight and token, head included, and in attention two products of queries with keys
    and of shares with values. Backward: twice the former; the latter five products in place of two, since
    fused attention computes its shares again."""
    shape: Size = SIZES[size]
    entries, samples, head = 300, 3, shape.width // shape.heads
    queries, keys = shape.width**2, shape.width * shape.key_value_heads * head
    weights = shape.layers * (2 * queries + 2 * keys + 3 * shape.width * shape.feed_forward)
    weights += entries * shape.width
    attention = shape.layers * 2 * (2 * samples * shape.heads * context**2 * head)
    model = build(llama_config(shape, entries, context))
    tokens = torch.randint(0, entries, (samples, context), dtype=torch.int32)
    loss, forward = flops_of(lambda: losses(logits(model, tokens), tokens).mean())
    assert forward == 2 * samples * context * weights + attention
    _, backward = flops_of(loss.backward)
    assert backward == 4 * samples * context * weights + attention * 5 // 2


def test_sizes_have_widths_for_blocks_and_share_embeddings_with_the_head() -> None:
    for shape in SIZES.values():
        head = shape.width // shape.heads
        for width in (shape.width, shape.feed_forward, shape.key_value_heads * head):
            assert width % 16 == 0
        assert shape.heads % shape.key_value_heads == 0 and head % 2 == 0
        assert 8 / 3 <= shape.feed_forward / shape.width < 8 / 3 + 32 / shape.width
    model: Any = build(llama_config(SIZES["tiny"], 300, 16))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = model.lm_head.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_weights_depend_on_the_seed_and_not_on_dropout(folder: Path) -> None:
    data, task = loaded(folder), get_task("lm")
    models = []
    for seed, dropout in ((3, 0.0), (3, 0.4), (4, 0.0)):
        torch.manual_seed(seed)
        models.append(task.build_model(data, dropout))
    first, same, other = (next(m.parameters()) for m in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert [m.config.attention_dropout for m in models] == [0.0, 0.4, 0.0]


def test_the_number_of_training_tokens_is_a_setting(folder: Path) -> None:
    whole, part = loaded(folder), loaded(folder, tokens=500)
    assert part.description["tokens"][0] == 31 * CONTEXT == len(part.train) * CONTEXT
    assert torch.equal(part.train.tensors[0], whole.train.tensors[0][:31])
    assert part.description["vocabulary"] == whole.description["vocabulary"]
    assert whole.description["tokens"][0] > 2000
    assert max(part.description["tokens"][1:]) <= 500
    assert f"An epoch is {31 * CONTEXT} tokens in blocks of 16." in part.description["note"]
    assert not torch.equal(loaded(folder, seed=1).train.tensors[0][:9], whole.train.tensors[0][:9])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "huge"}, "size must be one of tiny, small, base, or LAYERSxWIDTH.*got 'huge'"),
        ({"context": 1}, "context must be at least 2 tokens, got 1"),
        ({"tokens": 15}, r"tokens must be 0 \(all\) or at least a block of 16, got 15"),
        ({"tokens": -1}, "at least a block of 16, got -1"),
        ({"tokens": 10**9}, r"tokens must be 0 \(all\) or at most \d+, got 1000000000"),
    ],
)
def test_options_are_checked(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loaded(folder, **options)


def test_folds_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="over --seeds, not over --folds"):
        get_task("lm").load(Split(0, 0, 3, str(folder)), get_task("lm").options)


def test_the_epoch_of_the_lowest_loss_is_kept_and_patience_counts_from_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([3.0, 2.0, 2.5, 2.6, 1.0])

    def scripted(*_: Any) -> tuple[float, dict[str, float]]:
        loss = next(told)
        return loss, score_of_loss(loss)

    monkeypatch.setattr(epochs, "evaluate", scripted)
    given = dict(epochs=5, patience=2, device="cpu", data=str(folder))
    config = resolve("lm", options={"size": "tiny", "context": 16, "tokens": 160}, **given)
    result = run_arm(config, "baseline", tmp_path / "out", quiet=True)
    assert (result["best_epoch"], result["epochs"], result["state"]) == (2, 4, "stopped early")
    rows = (tmp_path / "out" / "history.csv").read_text().splitlines()
    column = rows[0].split(",").index("validation_nats")
    assert [float(row.split(",")[column]) for row in rows[1:]] == [3.0, 2.0, 2.5, 2.6]


def test_progress_shows_a_metric_that_is_not_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"epoch": 1, "validation_loss": 5.0, "validation_perplexity": 148.413, "sparsity": 0.0}
    row |= {"validation_accuracy": 0.5, "validation_nats": 5.0}
    for metrics, said in (
        ((NATS, PERPLEXITY), "validation loss 5.0000, perplexity 148.4"),
        ((ACCURACY, F1), "validation loss 5.0000, accuracy 0.500"),
        ((NATS,), "validation loss 5.0000, nats per token 5"),
    ):
        EpochProgress("baseline", 1, 10, beside_the_loss(metrics)).epoch(row)
        assert capsys.readouterr().err == f" baseline  epoch 1/1  {said}\n"


def _report(config: RunConfig, baseline: float, pruned: float) -> dict[str, Any]:
    arms = {}
    for arm, nats in (("baseline", baseline), ("pruned", pruned)):
        arms[arm] = {f"test_{name}": value for name, value in score_of_loss(nats).items()}
        arms[arm] |= {"epochs": 1, "interrupted": False, "parameters_active": 9, "train_seconds": 1.0}
        arms[arm] |= {"data": {"sizes": [60, 20, 40]}}
    arms["pruned"] |= {"sparsity": 0.75, "target_reached": True}
    return build_report(config.to_json(), {"cpu": "test"}, arms)


def test_summary_and_table_name_nats_and_bound_the_side_that_is_worse(tmp_path: Path) -> None:
    pairs = {0: (4.0, 4.03), 1: (4.1, 4.11), 2: (3.9, 3.88)}
    reports = {}
    for seed, nats in pairs.items():
        reports[f"seed-{seed}"] = _report(RunConfig("lm", seed=seed), *nats)
        (tmp_path / f"seed-{seed}").mkdir()
        write_json(tmp_path / f"seed-{seed}" / "report.json", reports[f"seed-{seed}"])
    summary = summarise(reports, 3)
    write_json(tmp_path / "summary.json", summary)
    found = summary["differences"]["test_nats"]
    expected = of_seeds([p - b for b, p in pairs.values()], lower_is_better=True)
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["high_one_sided"] > found["mean"] > 0
    assert summary["each"]["seed-1"]["nats"] == [4.1, 4.11]
    text = summary_markdown(summary)
    columns = "difference | 95 % interval, two-sided | over test rows | one-sided upper bound"
    assert f"| | baseline | pruned | {columns} |" in text
    assert f"| test nats per token | 4.0000 | 4.0067 | {found['mean']:+.4f} |" in text
    assert f"| {found['high_one_sided']:+.4f} |" in text and "| test perplexity |" in text
    results = read_results([tmp_path])
    assert f"| test nats per token, difference | {found['mean']:+.4f} (" in table_markdown(results)
    assert f"lm,test nats per token,difference,nats,3,{found['mean']}" in table_csv(results)
    assert read_report(tmp_path / "seed-0" / "report.json") is not None
    write_json(tmp_path / "report.json", reports["seed-0"] | {"baseline": {}})
    with pytest.raises(ValueError, match=r"baseline\.test_nats"):
        read_report(tmp_path / "report.json")


def test_both_arms_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["compare", "lm", "--size", "tiny", "--context", "16", "--epochs", "2", "--data", str(folder)]
    given += ["--calibration-samples", "32", "--lr", "0.01", "--warmup-steps", "2", "--out", str(out)]
    done = CliRunner().invoke(app, [*given, "--device", "cpu", "--target-sparsity", "0.5"])
    assert done.exit_code == 0, done.output
    report = read_report(out / "report.json")
    assert report is not None
    baseline, pruned = report["baseline"], report["pruned"]
    entries = baseline["data"]["vocabulary"]["entries"]
    for arm in (baseline, pruned):
        assert 0 < arm["test_nats"] < 0.9 * math.log(entries)
        assert arm["test_perplexity"] == pytest.approx(math.exp(arm["test_nats"]))
        assert arm["test_nats"] == arm["test_loss"]
    assert pruned["target_reached"] and pruned["sparsity"] >= 0.5
    assert pruned["blocks_removed"] > 0 and pruned["trial_calls"] > 0
    assert pruned["flops_per_step_last"] < baseline["flops_per_step_last"]
    kept = json.loads((out / "vocabulary.json").read_text())
    assert len(kept["pairs"]) <= entries and baseline["data"] == pruned["data"]
    text = (out / "report.md").read_text()
    assert f"| test nats per token | {baseline['test_nats']:.4f} | {pruned['test_nats']:.4f} |" in text
    assert "| test perplexity |" in text and "lower is better" in text
    assert (out / "curves.png").stat().st_size > 10_000
    table = CliRunner().invoke(app, ["table", str(out)])
    assert table.exit_code == 0 and "test nats per token, difference |" in table.output
