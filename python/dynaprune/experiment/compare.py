"""Both arms of a comparison, each in its own process, and the report of the two.

A comparison that was cut short goes on where it is started again with the same settings: an arm that has
finished is kept, and one that has a checkpoint goes on from there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dynaprune.experiment.interrupts import ArmInterrupts, signals_taken
from dynaprune.experiment.out_folder import CONFIG, check_settings
from dynaprune.experiment.report import OF_A_MACHINE, build_report
from dynaprune.experiment.report_text import write_markdown
from dynaprune.experiment.run_config import Resuming, RunConfig
from dynaprune.experiment.saved_results import read_arm, read_json
from dynaprune.experiment.sole_writer import LOCK_NAME, FolderInUse, note_writer, sole_writer
from dynaprune.experiment.state_files import holds_states, remove_states
from dynaprune.experiment.write import write_csv_lines, write_json

__all__ = ["ArmFailed", "compare"]

ARMS = ("baseline", "pruned")
CANNOT_START, CANNOT_WRITE = 2, 3


class ArmFailed(RuntimeError):
    """An arm's process ended without a result. ``code`` is its exit code.

    ``explained``: it has said why in one line on stderr (2: wrong input, 3: files that cannot be written)."""

    def __init__(self, arm: str, code: int) -> None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"the {arm} arm {how}; what it said stands above")
        self.code = code
        self.explained = code in (CANNOT_START, CANNOT_WRITE)


def _finished_arm(folder: Path, arm: str, config: RunConfig) -> dict[str, Any] | None:
    """The content of ``arm.json`` in ``folder`` if that arm was trained to its end.

    ValueError where its files are damaged, or where it was trained on another device or with other threads
    than this process has: the two arms could not be compared. Another processor is allowed, and the report
    says so."""
    found = read_arm(folder, arm, config.task)
    if found is None:
        return None
    import torch

    from dynaprune.experiment.metrics import environment

    here = environment(torch.device(config.device))
    different = [
        f"{key} {found['environment'].get(key)}, now {here[key]}"
        for key in OF_A_MACHINE
        if found["environment"].get(key) != here[key]
    ]
    if different:
        raise ValueError(
            f"{folder} holds an arm that was trained elsewhere ({'; '.join(different)}), whose times cannot "
            "be set beside this machine's: choose another --out"
        )
    return dict(found)


def _run_arm(
    config_path: Path,
    arm: str,
    out: Path,
    resuming: Resuming,
    interrupts: ArmInterrupts,
    quiet: bool,
    lock: int,
) -> dict[str, Any] | None:
    """The content of the arm's ``arm.json``; None where an interrupt ended it before it could write one."""
    command = [
        sys.executable,
        "-m",
        "dynaprune.experiment.train",
        str(config_path),
        "--arm",
        arm,
        "--out",
        str(out / arm),
        "--pretrained",
        str(out / "pretrained.safetensors"),
        "--checkpoint-minutes",
        str(resuming.checkpoint_minutes),
        "--parent",
        str(os.getpid()),
        *([] if resuming.checkpoints is None else ["--checkpoints", resuming.checkpoints]),
        *(["--restart"] if resuming.restart else []),
        *(["--quiet"] if quiet else []),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        pass_fds=(lock,),
    )
    note_writer(lock, process.pid, f"the {arm} arm of it")
    interrupts.child = process
    if interrupts.seen:
        process.send_signal(signal.SIGTERM)
    try:
        code = process.wait()
    finally:
        interrupts.child = None
        if process.poll() is None:
            process.kill()
            process.wait()
    result = out / arm / "arm.json"
    if result.is_file() and code in (0, 130):
        found = read_json(result)
        earlier = sum(part["process_seconds"] for part in found["result"]["parts"][:-1])
        found["result"]["process_seconds"] = earlier + time.perf_counter() - started
        write_json(result, found)
        return found
    if interrupts.seen:
        return None
    raise ArmFailed(arm, code)


def _forget(out: Path, config_path: Path, arm: str, checkpoints: Path) -> None:
    """Remove what an arm that could not start has left, so that the same command can be given again; not its
    checkpoints."""
    with contextlib.suppress(FolderInUse), sole_writer(out / arm):
        _clear(out / arm, checkpoints)
    if not any((out / other).exists() for other in ARMS):
        for left in (config_path, *out.glob("pretrained.*"), *out.glob("vocabulary.json")):
            left.unlink(missing_ok=True)


def _clear(folder: Path, checkpoints: Path) -> None:
    """Remove what an arm has left in ``folder``, but for its checkpoints."""
    if not holds_states(checkpoints):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for each in folder.iterdir():
        if each.is_file() and each.name != LOCK_NAME:
            each.unlink()


def _check_same_data(out: Path, arms: dict[str, dict[str, Any] | None]) -> None:
    """ValueError where the arms name different sources: the newest commit on the hub may have moved."""
    sources = {arm["data"].get("source") for arm in arms.values() if arm is not None and arm.get("data")}
    if len(sources) > 1:
        raise ValueError(
            f"the arms in {out} read different data ({', '.join(map(str, sources))}): choose another --out "
            "and a commit with --data hub@COMMIT"
        )


def compare(
    config: RunConfig,
    out: Path,
    *,
    quiet: bool = False,
    pictures: bool = True,
    interrupts: ArmInterrupts | None = None,
    resuming: Resuming | None = None,
) -> dict[str, Any]:
    """Train both arms on the same data and write ``out``: the report, histories and pictures. Returns the
    report.

    After an interrupt the report holds what was done (``interrupted`` true, an arm that never finished an
    epoch null). Started again, it keeps the arms in ``out`` that have finished, and goes on with the one that
    has a checkpoint.

    Raises:
        ValueError: another process writes ``out``; it holds other settings, damaged files, or an arm of
            another machine.
        ArmFailed: an arm ended without a result. OSError: ``out`` cannot be written.
    """
    if interrupts is None:
        interrupts = ArmInterrupts()
        with signals_taken(interrupts.take):
            return compare(
                config, out, quiet=quiet, pictures=pictures, interrupts=interrupts, resuming=resuming
            )
    with sole_writer(out) as lock:
        return _compare(config, out, resuming or Resuming(), quiet, pictures, interrupts, lock)


def _compare(
    config: RunConfig,
    out: Path,
    resuming: Resuming,
    quiet: bool,
    pictures: bool,
    interrupts: ArmInterrupts,
    lock: int,
) -> dict[str, Any]:
    config_path = out / CONFIG
    arms: dict[str, dict[str, Any] | None] = dict.fromkeys(ARMS)
    environment: dict[str, Any] = {}
    if continued := config_path.is_file():
        check_settings(out, read_json(config_path), config)
        for arm in ARMS:  # all of them before any is trained
            kept = _finished_arm(out / arm, arm, config)
            if kept is not None:
                arms[arm], environment = kept["result"], kept["environment"]
                remove_states(resuming.folder(arm, out / arm))
    write_json(config_path, config.to_json())
    for arm in ARMS:
        if interrupts.seen:
            break
        if arms[arm] is not None:
            continue
        checkpoints = resuming.folder(arm, out / arm)
        if continued:
            with sole_writer(out / arm):  # `dynaprune train` may be writing there
                _clear(out / arm, checkpoints)
        try:
            found = _run_arm(config_path, arm, out, resuming, interrupts, quiet, lock)
        except ArmFailed as error:
            if error.code == CANNOT_START:
                _forget(out, config_path, arm, checkpoints)
            raise
        if found is not None:
            arms[arm], environment = found["result"], found["environment"]
    _check_same_data(out, arms)
    report = build_report(config.to_json(), environment, arms)
    write_csv_lines(out / "history.csv", [out / arm / "history.csv" for arm in ARMS])
    write_json(out / "report.json", report)
    drawn: list[str] = []
    if pictures and any(arms.values()):
        from dynaprune.experiment.pictures import draw_all

        drawn = draw_all(out, report)
    write_markdown(out / "report.md", report, drawn)
    return report
