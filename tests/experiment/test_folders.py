"""One writer per folder, arms that end with their comparison, disks that fail, and files that are damaged."""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment import train
from dynaprune.experiment.out_folder import check_empty
from dynaprune.experiment.run_config import resolve
from dynaprune.experiment.sole_writer import LOCK_NAME, FolderInUse, sole_writer

ROOT = Path(__file__).resolve().parents[2]
LONG = ("digits", "--epochs", "5000", "--patience", "5000", "--quiet")


@pytest.fixture(scope="module", autouse=True)
def paths() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "python"), str(ROOT)]))
        # The arms run in processes of their own, and this one looks at what they made: with as many threads.
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield


def start(*arguments: object, **given: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dynaprune", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **given)


def wait_until(true: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def children(process: int) -> list[int]:
    """Its child processes that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with sole_writer(out):
        with pytest.raises(FolderInUse, match=rf"out is being written by process {os.getpid()} \(.+\): wait"):
            sole_writer(out).__enter__()
        with sole_writer(tmp_path / "other"):
            pass
        check_empty(out)
    assert not list(out.iterdir())
    with sole_writer(out):
        pass


def test_a_lock_that_a_killed_process_has_left_holds_nobody_up(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; from dynaprune.experiment.sole_writer import sole_writer\n"
        "with sole_writer(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL and (tmp_path / LOCK_NAME).is_file()
    check_empty(tmp_path)
    with sole_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_child_that_inherits_the_lock_holds_the_folder_alone(tmp_path: Path) -> None:
    """As an arm does whose comparison has just been killed."""
    with sole_writer(tmp_path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
        kept = os.dup(lock)
        (tmp_path / LOCK_NAME).rename(tmp_path / "kept")  # or else this process removes it
    os.close(kept)
    (tmp_path / "kept").rename(tmp_path / LOCK_NAME)
    try:
        with pytest.raises(FolderInUse):
            sole_writer(tmp_path).__enter__()
    finally:
        child.communicate(b"\n", timeout=60)
    with sole_writer(tmp_path):
        pass


def test_a_killed_comparison_takes_its_arm_along_and_a_second_one_waits_for_nobody(tmp_path: Path) -> None:
    """While the first runs, a second start, with the same settings and with others, and an arm alone in its
    folder are refused and change nothing."""
    out = tmp_path / "run"
    first = start("compare", *LONG, "--out", out)
    try:
        wait_until(lambda: (out / "baseline" / "history.csv").is_file() or first.poll() is not None)
        (arm,) = children(first.pid)
        runner = CliRunner()
        for arguments in (
            ("compare", *LONG, "--out", str(out)),
            ("compare", *LONG, "--out", str(out), "--seeds", "0,1"),
            ("train", *LONG, "--arm", "baseline", "--out", str(out / "pruned")),
        ):
            if arguments[0] == "train":
                (out / "pruned").mkdir()
                with sole_writer(out / "pruned"):
                    refused = runner.invoke(app, list(arguments))
                assert str(os.getpid()) in refused.stderr
            else:
                refused = runner.invoke(app, list(arguments))
                assert f"process {first.pid} (" in refused.stderr and f"process {arm} (" in refused.stderr
            assert refused.exit_code == 2 and "is being written by" in refused.stderr
            assert refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr
        assert alive(arm) and first.poll() is None and (out / "baseline" / "history.csv").is_file()
        first.kill()
        first.wait(30)
        wait_until(lambda: not alive(arm), 10)
    finally:
        first.kill()
        first.communicate()
    with sole_writer(out), sole_writer(out / "baseline"):
        pass


def test_an_arm_whose_comparison_has_gone_before_it_could_look_ends(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(resolve("digits", epochs=5000).to_json()))
    given = [sys.executable, "-m", "dynaprune.experiment.train", str(config), "--arm", "baseline", "--out"]
    done = subprocess.run([*given, str(tmp_path / "out"), "--parent", "1"], capture_output=True, timeout=120)
    assert done.returncode == 1 and not (tmp_path / "out").exists()


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_full_disk_ends_in_one_line(command: str, tmp_path: Path) -> None:
    """No file may pass 1,500 bytes: settings and histories fit, the best model does not."""
    own = ("--arm", "baseline") if command == "train" else ("--seeds", "0,1")
    out = tmp_path / "out"
    process = start(command, "digits", "--epochs", 1, "--quiet", "--out", out, *own, preexec_fn=limited)
    said, complained = process.communicate(timeout=200)
    assert process.returncode == (3 if command == "train" else 1)
    assert complained.startswith("error: cannot write ") and complained.count("\n") == 1, complained
    assert "checkpoint/best-000000001.safetensors: File too large" in complained and not said
    assert not list(out.rglob("*.tmp")) and not list(out.rglob(LOCK_NAME))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_named_with_its_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    opened = os.open

    def fail(path: Any, *more: Any, **given: Any) -> int:
        if "history.csv" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *more, **given)

    monkeypatch.setattr("dynaprune.saving.durable.os.open", fail)
    config = resolve("digits", epochs=1)
    assert train.exit_code(lambda: train.run_arm(config, "baseline", tmp_path / "out", quiet=True)) == 3
    said = capsys.readouterr().err
    assert said == f"error: cannot write {tmp_path / 'out' / 'history.csv'}: {os.strerror(number)}\n"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/no/such")):
        for own in ((), ("--seeds", "0,1")):
            done = CliRunner().invoke(app, ["compare", "digits", "--out", str(out), *own])
            assert done.exit_code == 1 and done.stderr.startswith("error: cannot write ")
            assert done.stderr.count("\n") == 1


def test_an_arm_that_was_killed_is_said_by_its_signal(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start("compare", *LONG, "--out", out)
    try:
        (arm,) = wait_until(lambda: children(process.pid))
        os.kill(arm, signal.SIGKILL)
        _, complained = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "the baseline arm was ended by SIGKILL" in complained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison whose two arms have finished, and whose report says it was cut short."""
    out = tmp_path_factory.mktemp("finished") / "run"
    process = start("compare", "digits", "--epochs", 2, "--quiet", "--out", out)
    _, complained = process.communicate(timeout=200)
    assert process.returncode == 0, complained
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**report, "interrupted": True}))
    return out


def in_json(name: str, *way: str, value: Any = None) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        found = json.loads((out / name).read_text())
        holder = found
        for key in way[:-1]:
            holder = holder[key]
        if value is None:
            del holder[way[-1]]
        else:
            holder[way[-1]] = value
        (out / name).write_text(json.dumps(found))

    return damage


def in_csv(row: int, column: str, cell: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        path = out / "baseline" / "history.csv"
        rows = list(csv.reader(path.open(newline="")))
        rows[row][rows[0].index(column)] = cell
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    return damage


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda out: (out / name).write_bytes(change((out / name).read_bytes())) and None


ARM, HISTORY = "baseline/arm.json", "baseline/history.csv"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "half an arm.json": (bytes_of(ARM, lambda b: b[: len(b) // 2]), r"arm\.json cannot .*: line \d+ column"),
    "an empty arm.json": (bytes_of(ARM, lambda b: b""), r"arm\.json cannot be read as JSON"),
    "an arm.json of other bytes": (bytes_of(ARM, lambda b: b"\xff" + b), r"arm\.json cannot be read as JSON"),
    "a list": (bytes_of(ARM, lambda b: b"[]"), r"arm\.json should hold a JSON object, got list"),
    "a key twice": (bytes_of(ARM, lambda b: b'{"arm":1,' + b[1:]), r"'arm' stands twice"),
    "the other arm's": (in_json(ARM, "arm", value="pruned"), r"expected arm to be 'baseline', got 'pruned'"),
    "no result": (in_json(ARM, "result"), r"expected result to be an object"),
    "no accuracy": (
        in_json(ARM, "result", "test_accuracy"),
        r"expected result\.test_accuracy to be a number",
    ),
    "text": (
        in_json(ARM, "result", "flops_total", value="x"),
        r"expected result\.flops_total to be a number",
    ),
    "NaN": (
        in_json(ARM, "result", "test_f1", value=float("nan")),
        r"expected result\.test_f1 to be a number",
    ),
    "interrupted as text": (in_json(ARM, "result", "interrupted", value="no"), "expected result.interrupted"),
    "no sizes": (in_json(ARM, "result", "data", "sizes"), r"expected result\.data\.sizes"),
    "no history": (lambda out: (out / HISTORY).unlink(), r"history\.csv cannot be read: FileNotFound"),
    "a cell": (in_csv(2, "train_loss", "x"), r"history\.csv, row 3, column train_loss: got 'x'"),
    "another epoch": (in_csv(1, "epoch", "7"), r"history\.csv, row 2, column epoch: got '7'"),
    "truth": (in_csv(1, "best", "yes"), r"history\.csv, row 2, column best: got 'yes'"),
    "a cut row": (bytes_of(HISTORY, lambda b: b[:-30]), r"history\.csv, row 3"),
    "a cut history": (bytes_of(HISTORY, lambda b: b[: b.rindex(b"\n", 0, -1) + 1]), r"expected 2 epochs"),
    "no header": (bytes_of(HISTORY, lambda b: b[b.index(b"\n") + 1 :]), r"row 1: expected the columns"),
    "half a density": (
        bytes_of("pruned/density.csv", lambda b: b[: b.rindex(b",")]),
        r"density\.csv, row \d",
    ),
    "no density": (lambda out: (out / "pruned/density.csv").unlink(), r"density\.csv cannot be read"),
    "half of the masks": (
        bytes_of("pruned/masks.npz", lambda b: b[: len(b) // 2]),
        r"masks\.npz cannot be read",
    ),
    "a hole in the masks": (
        bytes_of("pruned/masks.npz", lambda b: b[:90] + b"\0" * 20 + b[110:]),
        r"masks\.npz cannot be read",
    ),
    "no shapes": (in_json("pruned/masks.json", "shapes"), r"masks\.json: expected shapes and frames"),
    "half a report": (bytes_of("report.json", lambda b: b[:99]), r"report\.json cannot be read as JSON"),
    "an odd report": (in_json("report.json", "interrupted", value=1), "expected interrupted to be true or"),
    "half a config": (bytes_of("config.json", lambda b: b[:99]), r"config\.json cannot be read as JSON"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_files_are_named_before_anything_is_trained(
    damage: Callable[[Path], None], said: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    out = shutil.copytree(finished, tmp_path / "run")
    damage(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr("dynaprune.experiment.compare.run_in_process", None)
    done = CliRunner().invoke(app, ["compare", "digits", "--epochs", "2", "--quiet", "--out", str(out)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    assert done.stderr.startswith("error: ") and re.search(said, done.stderr), done.stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_an_arm_that_was_cut_is_trained_again_and_a_whole_one_kept(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "baseline" / "arm.json").unlink()
    (out / "baseline" / "history.csv").write_text("half")
    kept = (out / "pruned" / "arm.json").read_bytes()
    done = CliRunner().invoke(app, ["compare", "digits", "--epochs", "2", "--quiet", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads((out / "report.json").read_text())["interrupted"] is False
    assert (out / "pruned" / "arm.json").read_bytes() == kept


def test_arms_that_read_different_data_are_not_compared(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    in_json(ARM, "result", "data", "source", value="hub:some/name@abc")(out)
    done = CliRunner().invoke(app, ["compare", "digits", "--epochs", "2", "--quiet", "--out", str(out)])
    assert done.exit_code == 2 and "read different data" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"interrupted": false}', b'{"interrupted": true}'])
@pytest.mark.parametrize("command", ["table", "repeat"])
def test_damaged_reports_stop_tables_and_repetitions(
    damage: bytes, command: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "runs" / "seed-0")
    (run / "report.json").write_bytes(damage)
    monkeypatch.setattr("dynaprune.experiment.compare.run_in_process", None)
    own = ["--out", str(tmp_path / "runs"), "--epochs", "2", "--seeds", "0,1"]
    given = ["table", str(tmp_path / "runs")] if command == "table" else ["compare", "digits", *own]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.output
    )
    assert "report.json" in done.stderr or "no finished run" in done.stderr
