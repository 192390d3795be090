"""An arm in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dynaprune.experiment.interrupts import ArmInterrupts
from dynaprune.experiment.run_config import Resuming, RunConfig
from dynaprune.experiment.saved_results import read_json
from dynaprune.experiment.sole_writer import note_writer
from dynaprune.experiment.write import write_json

__all__ = ["CANNOT_START", "ArmFailed", "run_in_process"]

CANNOT_START, CANNOT_WRITE = 2, 3


class ArmFailed(RuntimeError):
    """An arm's process ended without a result. ``code`` is its exit code.

    ``explained``: it has said why in one line on stderr (2: wrong input, 3: files that cannot be written)."""

    def __init__(self, arm: str, code: int) -> None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"the {arm} arm {how}; what it said stands above")
        self.code = code
        self.explained = code in (CANNOT_START, CANNOT_WRITE)


def run_in_process(
    config_path: Path,
    config: RunConfig,
    arm: str,
    folder: Path,
    resuming: Resuming,
    interrupts: ArmInterrupts,
    quiet: bool,
    lock: int,
) -> dict[str, Any] | None:
    """Train the ``arm`` (NAME or NAME=VALUE) in ``folder``; the content of its ``arm.json``, or None where an
    interrupt ended it before it could write one.

    What arms share lies beside ``config_path``, whose settings differ from ``config``, the arm's, in learning
    rates only.

    Raises:
        ArmFailed: it ended without a result.
    """
    command = [
        sys.executable,
        "-m",
        "dynaprune.experiment.train",
        str(config_path),
        "--arm",
        arm,
        "--out",
        str(folder),
        "--lr",
        repr(config.lr),
        "--pretrained",
        str(config_path.parent / "pretrained.safetensors"),
        "--checkpoint-minutes",
        str(resuming.checkpoint_minutes),
        "--parent",
        str(os.getpid()),
        *([] if config.sparse_rate is None else ["--sparse-rate", config.sparse_rate]),
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
    result = folder / "arm.json"
    if result.is_file() and code in (0, 130):
        found = read_json(result)
        earlier = sum(part["process_seconds"] for part in found["result"]["parts"][:-1])
        found["result"]["process_seconds"] = earlier + time.perf_counter() - started
        write_json(result, found)
        return found
    if interrupts.seen:
        return None
    raise ArmFailed(arm, code)
