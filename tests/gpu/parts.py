"""Runs the parts of a call on a rented GPU: each has a time of its own, none outlasts the whole, and whatever
happens to one, the others run and the results are packed.

No part is trusted: it may hang, die, write nothing or want a tool that is not there.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KILLED_AFTER = 3.0  # seconds that a part has between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Part:
    """A command of a call.

    Attributes:
        name: of its log.
        seconds: that it may take.
        tool: a program that it cannot do without.
        together: parts of the same name, one after the other in the list, may run side by side.
        counts: whether its failure is the call's; that of a contestant in a benchmark is not.
        expects: a file in the folder of the call that it must leave, not empty.
    """

    name: str
    command: Sequence[str]
    seconds: float
    tool: str | None = None
    together: str | None = None
    counts: bool = True
    expects: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "passed", "failed" with its exit status, "hung", "no TOOL", "not begun", or
    "wrote no FILE"."""

    part: Part
    said: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the call may pass with it."""
        return self.said == "passed" or not self.part.counts


def run_call(parts: Sequence[Part], out: Path, limit: float, *, side_by_side: int = 4) -> list[Outcome]:
    """Run ``parts`` within ``limit`` seconds in all; names are printed before and outcomes after each.

    Logs go to ``out/NAME.log``, all outcomes to ``out/outcomes.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + limit
    outcomes: list[Outcome] = []
    for group in _groups(parts):
        with concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
            for outcome in pool.map(lambda part: _run(part, out, ends), group):
                outcomes.append(outcome)
        _write(out, outcomes)
    return outcomes


def pack(out: Path, name: str) -> Path:
    """Everything in ``out`` as ``out/NAME.tar.gz``: one file to bring home."""
    packed = out / f"{name}.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path != packed:
                archive.add(path, Path(name) / path.relative_to(out))
    return packed


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    found: list[list[Part]] = []
    for part in parts:
        if found and part.together is not None and found[-1][-1].together == part.together:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _run(part: Part, out: Path, ends: float) -> Outcome:
    left = ends - time.monotonic()
    if left < 1:
        return _told(Outcome(part, "not begun", 0.0))
    if part.tool is not None and shutil.which(part.tool) is None:
        return _told(Outcome(part, f"no {part.tool}", 0.0))
    seconds = min(part.seconds, left)
    print(f"{part.name}: at most {seconds:.0f} s", flush=True)
    began = time.monotonic()
    said = _end_of(part, out / f"{part.name}.log", seconds)
    if said == "passed" and part.expects is not None and not _has_content(out / part.expects):
        said = f"wrote no {part.expects}"
    return _told(Outcome(part, said, time.monotonic() - began))


def _end_of(part: Part, log: Path, seconds: float) -> str:
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                part.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **part.environment},
                start_new_session=True,  # so that what it started ends with it
            )
        except OSError as error:
            file.write(str(error).encode())
            return "failed to start"
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return "hung"
    _end(process)
    return "passed" if status == 0 else f"failed ({status})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it has started."""
    for number, wait in ((signal.SIGTERM, KILLED_AFTER), (signal.SIGKILL, KILLED_AFTER)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _told(outcome: Outcome) -> Outcome:
    print(f"{outcome.part.name}: {outcome.said} after {outcome.seconds:.0f} s", flush=True)
    return outcome


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    said = [{"part": o.part.name, "said": o.said, "seconds": round(o.seconds, 1)} for o in outcomes]
    (out / "outcomes.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
