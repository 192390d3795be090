"""Controls of the pruned arm's FLOPs, pilots, and comparisons that take both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from typer.testing import CliRunner, Result

from dynaprune.cli import app
from dynaprune.experiment import compare as comparison
from dynaprune.experiment import pilot as pilots
from dynaprune.experiment.arm_settings import ArmSettings
from dynaprune.experiment.controls import ARMS, CONTROLS, arm_name, arm_settings, check_controls
from dynaprune.experiment.controls_text import controls_table
from dynaprune.experiment.length import passes, samples_until, total_steps, with_steps
from dynaprune.experiment.out_folder import check_unfinished, check_value
from dynaprune.experiment.pilot import Grid, _best, _beyond, _Point
from dynaprune.experiment.planned_flops import flops_of_dense, flops_of_pruned
from dynaprune.experiment.rates import collect, read_rates, with_rate
from dynaprune.experiment.report import build_report
from dynaprune.experiment.run_config import RunConfig, resolve
from dynaprune.experiment.tasks import TaskData, get_task
from dynaprune.experiment.tasks.cifar10 import narrower as narrower_images
from dynaprune.experiment.tasks.llama import SIZES, Size, narrower, narrower_inside, size_of
from dynaprune.experiment.train import CannotStart, run_arm
from dynaprune.experiment.write import write_json
from tests.experiment.tasks.test_lm import reviews, write

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:block-sparse ops:RuntimeWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), reviews(120, 0), reviews(60, 1))


def sparse_lm(folder: Path, **given: Any) -> RunConfig:
    settings: dict[str, Any] = {"initial_sparsity": 0.5, "target_sparsity": 0.5, "rewire": 0.3}
    settings |= {"data": str(folder), "steps": 40, "lr": 0.002, "device": "cpu"}
    settings |= {"pruning": {"neurons": False}, **given}  # cutting a dead neuron saves what no plan knows
    return resolve("lm", options={"size": "tiny", "context": 16}, **settings)


def _given(name: str) -> str:
    """A control with its value, where it needs one."""
    return "small-time=2x32x4x2x88" if name == "small-time" else name


@pytest.fixture(scope="module")
def arms(folder: Path) -> dict[str, ArmSettings]:
    """Every control of a tiny language model."""
    config = sparse_lm(folder)
    task = get_task("lm")
    data = task.load(config.split(), config.options)
    return {name: arm_settings(_given(name), config, task, data) for name in CONTROLS}


def test_controls_of_equal_flops_are_near_those_of_the_pruned_arm(arms: dict[str, ArmSettings]) -> None:
    for name in ("small", "small-inner", "short"):
        arm = arms[name]
        assert not arm.pruned and arm.config.initial_sparsity is None and arm.config.rewire is None
        assert arm.dropout == 0 and arm.plan["ratio_planned"] == pytest.approx(1, abs=0.06), name
    whole, inner = (size_of(arms[name].config.options["size"]) for name in ("small", "small-inner"))
    assert whole.width < SIZES["tiny"].width and whole.layers == SIZES["tiny"].layers
    assert inner.width == SIZES["tiny"].width and inner.width_of_heads < 16
    assert inner.feed_forward < SIZES["tiny"].feed_forward
    assert 10 < (arms["short"].config.steps or 0) < 30
    assert arms["short"].config.warmup_steps == round(100 * (arms["short"].config.steps or 0) / 40)


def test_controls_of_the_method_differ_in_one_part(arms: dict[str, ArmSettings]) -> None:
    static, early = arms["static"].config, arms["gradual-early"].config
    assert arms["static"].pruned and static.initial_sparsity == 0.5 and static.rewire is None
    assert arms["gradual-early"].pruned and early.initial_sparsity is None and early.target_sparsity == 0.5
    pruning = early.pruning_config(1000)
    assert (pruning.start, pruning.end, pruning.allocation) == (0.0, 0.3, "uniform")
    assert early.calibration_samples == 0 and pruning.rewire == 0


@pytest.mark.parametrize("arm", ["pruned", *CONTROLS])
def test_planned_flops_are_those_that_a_training_counts(arm: str, folder: Path, tmp_path: Path) -> None:
    """Exact but for the order in which gradual removals round to whole blocks."""
    config = sparse_lm(folder)
    result = run_arm(config, _given(arm), tmp_path, quiet=True)
    task = get_task("lm")
    planned = result.get("plan", {}).get("flops_planned")
    if planned is None:
        planned = flops_of_pruned(config, task, task.load(config.split(), config.options))
    assert result["flops_total"] == pytest.approx(planned, rel=0.02 if arm == "gradual-early" else 1e-6)
    said = json.loads((tmp_path / "arm.json").read_text())
    assert said["arm"] == arm and said["result"]["settings"]["lr"] == 0.002
    assert json.loads((tmp_path / "config.json").read_text())["options"]["size"] == "tiny"
    if arm == "short":
        assert result["steps"] == result["plan"]["steps"] < 40
    if arm == "stretch":
        assert result["steps"] == 80 and result["plan"]["ratio_planned"] == pytest.approx(2, abs=0.3)
    if arm in ("static", "gradual-early"):
        assert result["sparsity"] == pytest.approx(0.5, abs=0.02) and result["target_reached"]
        assert result["trial_calls"] == 0 and result.get("blocks_swapped", 0) == 0


def test_a_training_ends_after_its_steps(folder: Path, tmp_path: Path) -> None:
    """In the middle of a pass, whose part is evaluated, or after several."""
    config = sparse_lm(folder, steps=None)
    rows = len(get_task("lm").load(config.split(), config.options).train)  # type: ignore[arg-type]
    batches = -(-rows // 32)
    longer = with_steps(config, batches + 2, rows)
    assert total_steps(config, rows) == batches and passes(config, rows) == 1
    assert passes(longer, rows) == longer.epochs == 2
    assert samples_until(batches + 2, longer, rows) == rows + 64
    result = run_arm(longer, "baseline", tmp_path, quiet=True)
    assert (result["steps"], result["epochs"]) == (batches + 2, 2)
    assert result["flops_total"] == pytest.approx(
        flops_of_dense(longer, get_task("lm"), get_task("lm").load(config.split(), config.options))
    )


def test_arms_are_named_or_refused() -> None:
    assert arm_name("small") == "small" and arm_name("pruned") == "pruned"
    assert arm_name("stretch=40%") == arm_name("stretch") == "stretch"
    for wrong in ("sparse", "small=3", "small=", "", "small-time", "stretch="):
        with pytest.raises(ValueError, match="got"):
            arm_name(wrong)
    check_controls(["small", "short"])
    for given in (["small", "small"], ["pruned"], ["larger"]):
        with pytest.raises(ValueError, match="--controls takes different names"):
            check_controls(given)


def test_a_control_that_cannot_be_made_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="initial_sparsity for the control static"):
        run_arm(resolve("digits", device="cpu"), "static", tmp_path)
    with pytest.raises(CannotStart, match="digits has no networks for the control small"):
        run_arm(resolve("digits", device="cpu"), "small", tmp_path)
    with pytest.raises(CannotStart, match="expected a target_sparsity"):
        run_arm(resolve("digits", device="cpu", self_paced=True), "short", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stretched_arm_has_as_many_steps_as_it_is_given(folder: Path) -> None:
    config, task = sparse_lm(folder), get_task("lm")
    data = task.load(config.split(), config.options)
    dense = flops_of_dense(config, task, data)
    for given, steps in (("stretch=3", 120), ("stretch=0.5", 20)):
        found = arm_settings(given, config, task, data)
        assert found.config.steps == found.plan["steps"] == steps and found.plan["asked"] == given
        assert found.pruned and found.config.rewire == 0.3
        assert found.config.warmup_steps == round(100 * steps / 40)
    within = arm_settings("stretch=90%", config, task, data)
    assert within.config.steps is not None and within.config.steps > 40
    assert flops_of_pruned(within.config, task, data) <= 0.9 * dense
    longer = with_steps(config, within.config.steps + 1, len(data.train))  # type: ignore[arg-type]
    assert flops_of_pruned(longer, task, data) > 0.9 * dense
    for wrong in ("stretch=x", "stretch=-1", "stretch=nan%", "small-time=huge"):
        with pytest.raises(ValueError, match=r"expected stretch|size must be"):
            arm_settings(wrong, config, task, data)


def test_an_arm_of_another_value_is_refused(tmp_path: Path) -> None:
    check_value(tmp_path, {"plan": {"asked": "stretch=3"}}, "stretch=3")
    check_value(tmp_path, {}, "baseline")
    for result, arm in (({"plan": {"asked": "stretch=3"}}, "stretch"), ({"plan": {}}, "stretch=3")):
        with pytest.raises(ValueError, match="holds the arm stretch"):
            check_value(tmp_path, result, arm)


def test_controls_of_photographs() -> None:
    """small and small-time of the ResNet: narrower, and near the FLOPs of the sparse start."""
    part = TensorDataset(torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6))
    sparse = {"initial_sparsity": 0.8, "target_sparsity": 0.8}
    config = resolve("cifar10", device="cpu", options={"width": 0.5}, **sparse)
    said = {"mean": [0.5] * 3, "deviation": [0.25] * 3}
    data = TaskData(part, part, part, 10, said, options=dict(config.options))
    small = arm_settings("small", config, get_task("cifar10"), data)
    assert small.plan["ratio_planned"] == pytest.approx(1, abs=0.15)
    assert 0.15 < small.config.options["width"] < 0.35
    timed = arm_settings("small-time=0.25", config, get_task("cifar10"), data)
    assert timed.config.options["width"] == 0.25 and timed.plan["width"] == 0.25
    with pytest.raises(ValueError, match=r"expected small-time=width like 1\.0, got 'x'"):
        arm_settings("small-time=x", config, get_task("cifar10"), data)


def test_sizes_are_read_as_they_are_written() -> None:
    for size in (*SIZES.values(), Size(6, 256, 8, 4, 320, 14)):
        assert size_of(str(size)) == size
    for wrong in ("huge", "2x64x4x2", "2x64x4x3x176", "2x64x4x2x0", "2x66x4x2x176", "2x64x4x2x176x5"):
        with pytest.raises(ValueError, match="size must"):
            size_of(wrong)


def test_narrower_networks_grow_up_to_the_whole_one() -> None:
    whole = SIZES["base"]
    for kind, fixed in ((narrower, "head_width"), (narrower_inside, "width")):
        steps = kind(whole)
        assert steps[-1][0].width == whole.width and steps[-1][0].feed_forward == whole.feed_forward
        assert all(getattr(each, fixed) == getattr(whole, fixed) for some in steps for each in some)
        assert [some[0].feed_forward for some in steps] == sorted(some[0].feed_forward for some in steps)
        assert all(size_of(str(each)) == each for some in steps for each in some)
    widths = [some[0]["width"] for some in narrower_images({"width": 0.5})]
    assert widths == sorted(widths) and widths[0] == 0.125 and widths[-1] > 0.48


def row(value: float | None) -> dict[str, Any]:
    return {"value": value}


def test_the_grid_goes_on_beyond_an_edge_where_the_best_lies() -> None:
    tried = {_Point(rate, None): row(value) for rate, value in ((1.0, 5.0), (2.0, 4.0), (4.0, None))}
    assert _best(tried, lower=True) == _Point(2.0, None) and _beyond(tried, _Point(2.0, None)) == []
    assert _best(tried, lower=False) == _Point(1.0, None)
    assert _beyond(tried, _Point(1.0, None)) == [_Point(0.5, None)]
    assert _beyond(tried, _Point(4.0, None)) == [_Point(8.0, None)]
    both = {_Point(rate, m): row(rate + m) for rate in (1.0, 2.0) for m in (1.0, 4.0)}
    assert _best(both, lower=False) == _Point(2.0, 4.0)
    assert _beyond(both, _Point(2.0, 4.0)) == [_Point(4.0, 4.0), _Point(2.0, 8.0)]
    with pytest.raises(ValueError, match="diverge"):
        _best({_Point(1.0, None): row(None)}, lower=True)
    with pytest.raises(ValueError, match="above 0"):
        Grid(rates=(0.0,))


def in_this_process(
    config_path: Path, config: RunConfig, arm: str, folder: Path, *_: Any
) -> dict[str, Any] | None:
    run_arm(config, arm, folder, quiet=True)
    return dict(json.loads((folder / "arm.json").read_text()))


def digits(**given: Any) -> RunConfig:
    settings: dict[str, Any] = {"target_sparsity": 0.5, "initial_sparsity": 0.5, "steps": 30, "lr": 0.001}
    return resolve("digits", device="cpu", **{**settings, **given})


@pytest.fixture(scope="module")
def piloted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arms baseline, pruned (with multipliers) and short of digits, in pilots of ten steps."""
    out = tmp_path_factory.mktemp("piloted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pilots, "run_in_process", in_this_process)
        grid = Grid(rates=(0.5, 1.0, 2.0), multipliers=(1.0, 2.0))
        assert not pilots.pilot(digits(), ["baseline", "pruned"], out, grid=grid, quiet=True)
        assert not pilots.pilot(digits(), ["short"], out, grid=grid, quiet=True)
    return out


def test_a_pilot_chooses_the_rate_by_the_validation_part(piloted: Path) -> None:
    said = json.loads((piloted / "pilot.json").read_text())
    assert said["seed"] == 100 and said["task"] == "digits" and set(said["arms"]) == {*ARMS, "short"}
    for arm, found in said["arms"].items():
        best = max(found["grid"], key=lambda each: each["value"])
        assert (found["value"], found["metric"]) == (best["value"], "validation_accuracy")
        assert len(found["grid"]) >= (6 if arm == "pruned" else 3)
        tried = {each["lr"] for each in found["grid"]}
        assert {0.0005, 0.001, 0.002} <= tried
        assert found["steps"] == {"baseline": 10, "pruned": 10, "short": 5}.get(arm)
        assert {each["sparse_rate"] for each in found["grid"]} >= ({"1", "2"} if arm == "pruned" else {None})
        rate = f"{best['lr']:g}" + (f"-x{best['sparse_rate']}" if arm == "pruned" else "")
        point = json.loads((piloted / "pilot" / arm / rate / "arm.json").read_text())["result"]
        assert point["validation_accuracy"] == best["value"] and point["settings"]["seed"] == 100
        assert not any(name.startswith("test_") for name in point)


def test_a_pilot_that_has_finished_trains_nothing_again(
    piloted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilots, "run_in_process", None)
    before = (piloted / "pilot.json").read_bytes()
    grid = Grid(rates=(0.5, 1.0, 2.0), multipliers=(1.0, 2.0))
    assert not pilots.pilot(digits(), ["short"], piloted, grid=grid, quiet=True)
    assert (piloted / "pilot.json").read_bytes() == before
    with pytest.raises(ValueError, match="other settings"):
        pilots.pilot(digits(batch_size=16), ["short"], piloted, grid=grid, quiet=True)


def test_rates_of_pilots_are_given_to_their_arms(piloted: Path) -> None:
    arms = ("baseline", "pruned", "short")
    rates = read_rates(piloted / "pilot.json", digits(seed=3, lr=0.5), arms)
    said = json.loads((piloted / "pilot.json").read_text())["arms"]
    for arm in arms:
        given = with_rate(digits(), arm, rates)
        assert (given.lr, given.sparse_rate) == (said[arm]["lr"], said[arm]["sparse_rate"])
    with pytest.raises(ValueError, match="seed 100 chose the learning rates"):
        read_rates(piloted / "pilot.json", digits(seed=100), arms)
    with pytest.raises(ValueError, match="no learning rate of static"):
        read_rates(piloted / "pilot.json", digits(), ["static"])
    with pytest.raises(ValueError, match=r"other settings \(target_sparsity\)"):
        read_rates(piloted / "pilot.json", digits(target_sparsity=0.6), arms)


def test_a_damaged_pilot_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pilot.json"
    for arms in ([], {"short": {}}, {"short": {"lr": -1, "sparse_rate": None, "config": {}}}):
        write_json(path, {"seed": 100, "arms": arms})
        with pytest.raises(ValueError, match=str(path)):
            read_rates(path, digits(), ["short"])
    assert collect(tmp_path) is None


def test_a_comparison_takes_controls_finished_arms_and_the_rates_of_pilots(
    piloted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "run_in_process", in_this_process)
    out, arms = tmp_path / "out", ("baseline", "pruned", "short")
    rates = read_rates(piloted / "pilot.json", digits(), arms)
    alone = run_arm(with_rate(digits(), "short", rates), "short", out / "short", quiet=True)
    check_unfinished(out, digits(), arms)
    report = comparison.compare(digits(), out, controls=["short"], rates=rates, pictures=False)
    assert report["controls"]["short"]["flops_total"] == alone["flops_total"]
    assert report["controls"]["short"]["train_seconds"] == alone["train_seconds"], "it was trained again"
    for name, arm in {**report, **report["controls"]}.items():
        if name in arms:
            assert arm["settings"]["lr"] == rates[name]["lr"]
    text = (out / "report.md").read_text()
    rate = f"{rates['short']['lr']:g}"
    assert f"| {rate} | steps {alone['plan']['steps']} |" in text and "| pruned |" in text
    with pytest.raises(ValueError, match="holds files"):
        check_unfinished(out, digits(), arms)
    check_unfinished(out, digits(), (*arms, "static"))
    report = comparison.compare(digits(), out, controls=["short", "static"], rates=rates, pictures=False)
    assert set(report["controls"]) == {"short", "static"} and not report["interrupted"]
    other = {**rates, "short": {**rates["short"], "lr": 0.3}}
    with pytest.raises(ValueError, match=r"short holds a run with other settings \(lr\)"):
        comparison.compare(digits(), out, controls=["short"], rates=other, pictures=False)


def test_the_report_says_how_far_planned_and_counted_flops_differ() -> None:
    plan = {"flops_planned": 40.0, "flops_planned_of_pruned": 50.0, "ratio_planned": 0.8}
    pruned = {"test_accuracy": 0.5, "test_f1": 0.5, "flops_total": 100, "train_seconds": 1.0}
    control = {**pruned, "flops_total": 44, "plan": plan, "settings": {"lr": 0.01, "sparse_rate": "4"}}
    report = {"task": "digits", "baseline": None, "pruned": pruned, "controls": {"short": control}}
    found = {line.split(" | ")[0]: line.split(" | ") for line in controls_table(report) if "|" in line}
    assert found["| pruned"][3:7] == ["100 FLOP", "1.000", "1.000", "2.000"]
    assert found["| short"][3:7] == ["44 FLOP", "0.440", "0.800", "1.100"]
    assert "0.01, sparse layers x4" in found["| short"] and found["| baseline"][1] == "-"


def test_the_command_line_pilots_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "run_in_process", in_this_process)
    monkeypatch.setattr(pilots, "run_in_process", in_this_process)
    given = ["digits", "--steps", "12", "--initial-sparsity", "0.5", "--target-sparsity", "0.5", "--quiet"]
    given += ["--device", "cpu", "--out", str(tmp_path / "out")]

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    for arm in ("baseline", "short"):
        done = invoke("train", *given, "--arm", arm, "--pilot", "--pilot-rates", "0.1,1,10000")
        assert done.exit_code == 0, done.output
    told = invoke("compare", *given, "--controls", "short", "--seeds", "0,1")
    assert told.exit_code == 2 and "no learning rate of pruned: pilot them too" in _words(told)
    assert (
        invoke("train", *given, "--arm", "pruned", "--pilot", "--pilot-rates", "0.1,1,10000").exit_code == 0
    )
    done = invoke("compare", *given, "--controls", "short", "--seeds", "0,1")
    assert done.exit_code == 0 and "over test rows" in done.output, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["controls"]["short"]["runs"] == summary["runs"] == 2
    chosen = json.loads((tmp_path / "out" / "pilot.json").read_text())["arms"]["short"]["lr"]
    report = json.loads((tmp_path / "out" / "seed-1" / "report.json").read_text())
    assert report["controls"]["short"]["settings"]["lr"] == chosen
    rates = [
        "--rates",
        str(tmp_path / "out" / "pilot.json"),
        "--arm",
        "short",
        "--out",
        str(tmp_path / "one"),
    ]
    assert invoke("train", *given, "--seed", "5", *rates).exit_code == 0
    alone = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (alone["lr"], alone["seed"]) == (chosen, 5)
    assert "seed 100 chose" in _words(invoke("train", *given, "--seed", "100", *rates))


def _words(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--controls", "small,larger"), "--controls takes different names of small"),
        (("--controls", "small-time"), "expected small-time=VALUE, got 'small-time'"),
        (("--pilot-rates", "1"), "go with --pilot"),
        (("--pilot", "--pilot-rates", "1,x"), "--pilot-rates takes numbers with commas"),
        (("--pilot", "--pilot-rates", "-1"), "expected pilot rates above 0"),
        (("--rates", "/no/such/file"), "/no/such/file cannot be read"),
        (("--steps", "0"), "steps must be a whole number of at least 1, got 0"),
        (("--calibration-samples", "-1"), "calibration_samples must be a whole number of at least 0"),
    ],
)
def test_wrong_input_is_told(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["compare", "digits", "--out", str(tmp_path / "out"), *arguments])
    assert told.exit_code == 2 and said in _words(told)
    assert not (tmp_path / "out").exists()


def test_a_report_without_controls_has_no_word_of_them() -> None:
    report = build_report(digits().to_json(), {}, {"baseline": None, "pruned": None})
    assert "controls" not in report and controls_table(report) == []
