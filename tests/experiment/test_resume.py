"""An arm that is killed goes on from its last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment import metrics, train
from dynaprune.experiment.controls import ARMS
from dynaprune.experiment.network import DenseNetwork
from dynaprune.experiment.report import build_report
from dynaprune.experiment.steps import TrainState
from dynaprune.experiment.train import CannotStart
from dynaprune.saving import durable
from dynaprune.saving.tensor_file import read_tensors, write_tensors
from tests.experiment.killed import (
    Killed,
    differences_when_killed,
    run,
    saved_steps,
    small_arms,
    small_digits,
)
from tests.experiment.same_course import differences

ROOT = Path(__file__).resolve().parents[2]
CONFIG = small_digits()


@pytest.fixture(scope="module", autouse=True)
def small_network() -> Iterator[None]:
    with small_arms():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both arms, each trained in one go."""
    out = tmp_path_factory.mktemp("undisturbed")
    for arm in ARMS:
        result = run(CONFIG, arm, out / arm)
        assert result is not None and result["steps"] == 80 and len(result["parts"]) == 1
        assert sorted(path.name for path in (out / arm).iterdir() if path.is_dir()) == []
        assert result["best_epoch"] == 3
        if arm == "pruned":
            events = [row["step"] for row in result["pruner"]["history"]]
            assert len(events) > 5 and result["pruner"]["blocks_regrown"] > 0
            assert result["neurons_removed"] > 0
    return out


def other_random_states() -> None:
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)


@pytest.mark.parametrize("arm", ARMS)
def test_two_undisturbed_trainings_are_equal(arm: str, undisturbed: Path, tmp_path: Path) -> None:
    other_random_states()
    assert run(CONFIG, arm, tmp_path) is not None
    assert differences(undisturbed / arm, tmp_path) == []


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("minutes", "kills", "parts"),
    [
        # After every step, so that each loses the one under way; a process that wrote nothing is no part.
        (0, (1, 2, 14, 4, 8, 1, 11, 20), [0, 1, 14, 17, 24, 34, 53]),
        # After every epoch of 20 steps.
        (10, (13, 21, 33, 20), [0, 20, 40]),
    ],
)
def test_an_arm_killed_many_times_ends_as_the_undisturbed_one(
    arm: str, minutes: float, kills: tuple[int, ...], parts: list[int], undisturbed: Path, tmp_path: Path
) -> None:
    for number in kills:
        other_random_states()
        assert run(CONFIG, arm, tmp_path, kill=number, minutes=minutes) is None
        assert not (tmp_path / "arm.json").exists()
    result = run(CONFIG, arm, tmp_path, minutes=minutes)
    assert result is not None and [part["steps_before"] for part in result["parts"]] == parts
    assert differences(undisturbed / arm, tmp_path) == []
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("given", "regrow"),
    [
        ({"units": "both"}, 0.0),
        ({"initial_sparsity": 0.5}, 0.3),
        ({"initial_sparsity": 0.6}, 0.0),
    ],
    ids=["both", "sparse start", "sparse from start to end"],
)
def test_other_kinds_of_pruning_go_on(given: dict[str, Any], regrow: float, tmp_path: Path) -> None:
    config = small_digits(optimizer="adamw", **given)
    config = replace(config, pruning={**config.pruning, "regrow": regrow})
    result = run(config, "pruned", tmp_path / "whole")
    assert result is not None and result["sparsity"] >= 0.6
    out = tmp_path / "cut"
    assert differences_when_killed(config, "pruned", tmp_path / "whole", out, kills=(11, 16, 30)) == []


@pytest.mark.parametrize(
    ("arm", "steps", "kills"), [("short", 35, (21, 9, 7)), ("stretch=1.3", 104, (21, 62, 22))]
)
def test_controls_that_end_within_a_pass_go_on(
    arm: str, steps: int, kills: tuple[int, ...], tmp_path: Path
) -> None:
    """Also where the process is killed in its last steps."""
    config = small_digits(initial_sparsity=0.6)
    config = replace(config, pruning={**config.pruning, "regrow": 0.0})
    result = run(config, arm, tmp_path / "whole")
    assert result is not None and result["steps"] == steps
    out = tmp_path / "cut"
    assert differences_when_killed(config, arm, tmp_path / "whole", out, kills=kills) == []


@pytest.mark.parametrize("where", ["before_evaluation", "write", "end_of_training"])
def test_an_arm_killed_outside_of_its_steps_goes_on(
    where: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it evaluates the last epoch, writes what it has become, and measures."""
    from dynaprune.experiment.network import PrunedNetwork

    real, calls = getattr(PrunedNetwork, where), 0

    def last(self: DenseNetwork, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (4 if where == "before_evaluation" else 1):
            raise Killed
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(PrunedNetwork, where, last)
        assert run(CONFIG, "pruned", tmp_path) is None
    other_random_states()
    assert run(CONFIG, "pruned", tmp_path) is not None
    assert differences(undisturbed / "pruned", tmp_path) == []


def test_an_arm_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last file is left aside, as SIGKILL leaves it, and taken away."""
    real, calls = os.replace, 0

    def cut(source: Any, target: Any) -> None:
        nonlocal calls
        if Path(target).name.startswith("step-"):
            calls += 1
            if calls == 3:
                shutil.copy(source, Path(target).with_name(f".{Path(target).name}.1.0123abcd.tmp"))
                raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "replace", cut)
        assert run(CONFIG, "pruned", tmp_path) is None
    folder = tmp_path / "checkpoint"
    assert saved_steps(folder) == [20, 40] and len(list(folder.glob(".*.tmp"))) == 1
    assert run(CONFIG, "pruned", tmp_path, kill=1) is None and not list(folder.glob(".*.tmp"))
    result = run(CONFIG, "pruned", tmp_path)
    assert result is not None and [part["steps_before"] for part in result["parts"]] == [0, 40]
    assert differences(undisturbed / "pruned", tmp_path) == []


SCRIPT = """
import os, signal, sys
from pathlib import Path
from dynaprune.experiment.steps import TrainState
from tests.experiment.killed import run, small_arms, small_digits
real = TrainState.step
def step(self, *given, **named):
    loss = real(self, *given, **named)
    if self.schedule.last_epoch == 47:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
TrainState.step = step
with small_arms():
    run(small_digits(), "pruned", Path(sys.argv[1]), minutes=0)
"""


def test_a_process_that_was_ended_by_sigkill_goes_on_in_another(undisturbed: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, timeout=100
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert saved_steps(tmp_path / "checkpoint") == [45, 46]
    result = run(CONFIG, "pruned", tmp_path)
    assert result is not None and result["parts"][1]["steps_before"] == 46
    assert differences(undisturbed / "pruned", tmp_path) == []


def test_an_interrupted_arm_reports_and_then_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainState.step

    def step(self: TrainState, *given: Any, **named: Any) -> Any:
        loss = real(self, *given, **named)
        if self.schedule is not None and self.schedule.last_epoch == 33:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "step", step)
        result = run(CONFIG, "pruned", tmp_path)
    assert result is not None and result["interrupted"] and result["steps"] == 33
    assert json.loads((tmp_path / "arm.json").read_text())["result"]["interrupted"]
    result = run(CONFIG, "pruned", tmp_path)
    assert result is not None and result["parts"][1]["steps_before"] == 33
    assert differences(undisturbed / "pruned", tmp_path) == []


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned arm that was killed in its last epoch, with two checkpoints and two best models."""
    out = tmp_path_factory.mktemp("cut") / "arm"
    assert run(CONFIG, "pruned", out, kill=77) is None
    names = ["best-000000002", "best-000000003", "step-000000040", "step-000000060"]
    assert sorted(path.stem for path in (out / "checkpoint").glob("*.safetensors")) == names
    return out


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("step-000000060", half),
        ("step-000000060", flipped),
        ("step-000000060", lambda content: b""),
        ("best-000000003", flipped),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    name: str,
    damage: Callable[[bytes], bytes],
    cut: Path,
    undisturbed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = shutil.copytree(cut, tmp_path / "arm")
    path = out / "checkpoint" / f"{name}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    result = run(CONFIG, "pruned", out)
    said = capfd.readouterr().err
    assert f"{path} cannot be read" in said and "going on from step-000000040" in said
    assert result is not None and result["parts"][1]["steps_before"] == 40
    assert differences(undisturbed / "pruned", out) == []


def test_without_a_whole_checkpoint_nothing_is_trained_and_a_restart_begins_anew(
    cut: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(cut, tmp_path / "arm")
    for path in (out / "checkpoint").glob("step-*.safetensors"):
        path.write_bytes(half(path.read_bytes()))
    with pytest.raises(CannotStart, match=r"step-000000060.*step-000000040.*no checkpoint.*--restart"):
        run(CONFIG, "pruned", out)
    result = run(CONFIG, "pruned", out, restart=True)
    assert result is not None and [part["steps_before"] for part in result["parts"]] == [0]
    assert differences(undisturbed / "pruned", out) == []


def test_a_checkpoint_of_another_training_is_refused_with_the_difference(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = shutil.copytree(cut / "checkpoint", tmp_path / "kept" / "pruned")
    shared = str(kept.parent)
    with pytest.raises(CannotStart, match=r"\(lr 0.03, here 0.01\).*--checkpoints, or --restart"):
        run(small_digits(lr=0.01), "pruned", tmp_path / "out", checkpoints=shared)
    shutil.copytree(kept, kept.parent / "baseline")
    with pytest.raises(CannotStart, match=r"\(arm 'pruned', here 'baseline'\)"):
        run(CONFIG, "baseline", tmp_path / "out", checkpoints=shared)
    with monkeypatch.context() as patch:
        from sklearn import datasets

        images, labels = datasets.load_digits(return_X_y=True)
        images[0, 0] += 1
        patch.setattr(datasets, "load_digits", lambda return_X_y: (images, labels))
        with pytest.raises(CannotStart, match=r"\(data of fingerprint [0-9a-f]{12}, here [0-9a-f]{12}\)"):
            run(CONFIG, "pruned", tmp_path / "out", checkpoints=shared)
    assert saved_steps(kept) == [40, 60] and not (tmp_path / "out" / "config.json").exists()


def test_another_version_or_processor_goes_on_and_is_marked(
    cut: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(cut, tmp_path / "arm")
    here = metrics.environment(torch.device("cpu"))
    elsewhere = {**here, "cpu": "Another", "versions": {**here["versions"], "torch": "9.9"}}
    monkeypatch.setattr(metrics, "environment", lambda device: elsewhere)
    result = run(CONFIG, "pruned", out)
    assert result is not None and differences(undisturbed / "pruned", out) == []
    baseline = json.loads((undisturbed / "baseline" / "arm.json").read_text())["result"]
    marks = build_report(CONFIG.to_json(), here, {"baseline": baseline, "pruned": result})["marks"]
    torch_then = f"another torch ({here['versions']['torch']}, then 9.9) and another processor ("
    assert len(marks) == 2 and "pruned arm went on after step 60" in marks[0] and torch_then in marks[0]
    assert "different processors" in marks[1]


def test_a_checkpoint_of_another_format_is_refused(cut: Path, tmp_path: Path) -> None:
    out = shutil.copytree(cut, tmp_path / "arm")
    path = out / "checkpoint" / "step-000000060.safetensors"
    whole = read_tensors(path)
    said = json.loads(whole.metadata["dynaprune.arm"])
    write_tensors(path, whole.tensors, {"dynaprune.arm": json.dumps({**said, "version": 99})})
    with pytest.raises(CannotStart, match=r"of version 99, expected 1: --restart"):
        run(CONFIG, "pruned", out)
    state = {name: tensor for name, tensor in whole.tensors.items() if not name.endswith(".7")}
    write_tensors(path, state, whole.metadata)
    result = run(CONFIG, "pruned", out)
    assert result is not None and result["parts"][1]["steps_before"] == 40


def test_checkpoints_in_a_folder_of_their_own(cut: Path, undisturbed: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert run(CONFIG, "pruned", tmp_path / "arm", kill=50, checkpoints=str(kept)) is None
    assert not (tmp_path / "arm" / "checkpoint").exists() and saved_steps(kept / "pruned") == [20, 40]
    assert run(CONFIG, "pruned", tmp_path / "arm", checkpoints=str(kept)) is not None
    assert differences(undisturbed / "pruned", tmp_path / "arm") == []
    assert not (kept / "pruned").exists()


def test_a_finished_arm_is_not_trained_again(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(undisturbed / "baseline", tmp_path / "arm")
    monkeypatch.setattr(train, "run_arm", None)
    given = ["train", "digits", "--arm", "baseline", "--out", str(out)]
    monkeypatch.setattr("dynaprune.cli.options.resolve", lambda task, **_: small_digits(lr=0.01))
    other = CliRunner().invoke(app, given)
    assert other.exit_code == 2 and "other settings (lr)" in other.stderr, other.stderr
    monkeypatch.setattr("dynaprune.cli.options.resolve", lambda task, **_: CONFIG)
    same = CliRunner().invoke(app, given)
    assert same.exit_code == 0 and "has finished" in same.stdout
    wrong = CliRunner().invoke(app, [*given, "--checkpoint-minutes", "-1"])
    assert wrong.exit_code == 2 and "checkpoint_minutes must be at least 0" in wrong.stderr
