"""An arm's checkpoints on the disk: the newest two, each with the best model of its time in a file beside it.

A checkpoint is one safetensors file under a checksum of all its bytes. The plain values of an arm's state are
JSON in a tensor of it (``dynaprune.saving.carried``); JSON in its metadata says which training it is of. One
that is damaged is passed over for the one before it."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaprune.experiment.arm import Arm
from dynaprune.experiment.arm_state import best_state, resume_arm, state_of_arm
from dynaprune.experiment.run_config import RunConfig, differing_settings
from dynaprune.experiment.sole_writer import sole_writer
from dynaprune.experiment.steps import now
from dynaprune.saving.carried import from_tensors, to_tensors
from dynaprune.saving.tensor_file import TensorFile, read_tensors, unique_names, write_tensors

__all__ = ["Checkpoints", "Identity", "Saved", "open_checkpoints", "remove_checkpoints", "saved_steps"]

VERSION = 1
_KEPT = 2
_METADATA = "dynaprune.arm"
_STEP = re.compile(r"step-(\d{9,})\.safetensors")
_BEST = re.compile(r"best-(\d{6,})\.safetensors")
_LEFT = re.compile(r"\.(step|best)-\d+\.safetensors\..+\.tmp")
_ANEW = "--restart trains the arm from its start"


@dataclass(frozen=True)
class Identity:
    """Which training a checkpoint is of: only one of the same arm, settings and data goes on.

    ``data`` is the fingerprint of the data."""

    arm: str
    config: RunConfig
    data: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in a checkpoint."""
        return {"arm": self.arm, "config": self.config.to_json(), "data": self.data}

    def refuse_other(self, said: Mapping[str, Any], path: Path) -> None:
        """ValueError that names the differences, unless ``said``, in the file ``path``, is the same."""
        differences = [
            f"{name} {theirs!r}, here {mine!r}"
            for name, (theirs, mine) in differing_settings(said["config"], self.config).items()
        ]
        if said["arm"] != self.arm:
            differences.append(f"arm {said['arm']!r}, here {self.arm!r}")
        if said["data"] != self.data:
            differences.append(f"data of fingerprint {said['data'][:12]}, here {self.data[:12]}")
        if differences:
            raise ValueError(
                f"{path} is of another training ({'; '.join(differences)}): choose another folder with --out "
                f"or --checkpoints, or {_ANEW}"
            )


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read: its file, the state, that of the best model, and where it was written."""

    path: Path
    state: dict[str, Any]
    best: dict[str, Any] | None
    environment: dict[str, Any]


class Checkpoints:
    """The checkpoints of one arm in one folder.

    Attributes:
        environment: versions, processor and threads of this process.
        seconds: that were spent on writing them, in all parts of the training.
        written: how many there were.
    """

    def __init__(
        self, folder: Path, identity: Identity, environment: Mapping[str, Any], every_seconds: float
    ) -> None:
        self.folder, self.identity = folder, identity
        self.seconds, self.written = 0.0, 0
        self.environment, self._every_seconds = dict(environment), every_seconds
        self._earlier: list[dict[str, Any]] = []
        self._first_step = 0
        self._best: int | None = None
        self._started = self._last = time.monotonic()

    @property
    def parts(self) -> list[dict[str, Any]]:
        """One entry per process that trained the arm: the steps before it, its seconds and its machine."""
        here = {
            "steps_before": self._first_step,
            "process_seconds": time.monotonic() - self._started,
            "environment": self.environment,
        }
        return [*self._earlier, here]

    def due(self) -> bool:
        """Whether the last checkpoint is so old that one should be written within the epoch."""
        return time.monotonic() - self._last >= self._every_seconds

    def write(self, arm: Arm) -> None:
        """Write a checkpoint, and let go of all but the one before it. Its time counts as no training time.

        OSError: a disk that is full or read-only; earlier checkpoints stay."""
        begun = now(arm.state.device)
        best, steps = arm.done.best_epoch, arm.done.steps
        if best is not None and best != self._best:
            self._write(_best_name(best), best_state(arm))
            self._best = best
        own = {"parts": self.parts, "seconds": self.seconds, "written": self.written + 1}
        self._write(f"step-{steps:09d}.safetensors", {"arm": state_of_arm(arm), "checkpoints": own})
        _keep_newest(_numbered(self.folder, _STEP), steps)
        _keep_newest(_numbered(self.folder, _BEST), best or 0)
        self.written += 1
        self._last = time.monotonic()
        spent = now(arm.state.device) - begun
        self.seconds += spent
        arm.leave_out(spent)

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        said = {"version": VERSION, **self.identity.to_json(), "environment": self.environment}
        write_tensors(self.folder / name, to_tensors(state), {_METADATA: json.dumps(said)})

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole; None where there is none at all. One that is passed over is
        named on stderr.

        ValueError: a checkpoint of another training, or none that is whole."""
        damaged: list[str] = []
        for _, path in sorted(_numbered(self.folder, _STEP).items(), reverse=True):
            try:
                saved = self._read(path)
            except _Damaged as error:
                damaged.append(str(error))
                continue
            for said in damaged:
                print(f"{said}: going on from {path.name}, the one before it", file=sys.stderr)
            return saved
        if damaged:
            raise ValueError(f"{'; '.join(damaged)}: no checkpoint is whole, and {_ANEW}")
        return None

    def _read(self, path: Path) -> Saved:
        state, environment = self._checked(path)
        epoch = state["arm"]["outcome"]["best_epoch"]
        best = None if epoch is None else self._checked(self.folder / _best_name(epoch))[0]
        return Saved(path, state, best, environment)

    def _checked(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state in a file of this training, and the environment that it was written in."""
        try:
            found = read_tensors(path)
            said = _identity_in(found)
            state = from_tensors(found.tensors)
        except (ValueError, OSError) as error:
            raise _Damaged(f"{path} cannot be read: {error}") from None
        if state is None:
            raise _Damaged(f"{path} cannot be read: it holds no state")
        if said["version"] != VERSION:
            raise ValueError(
                f"{path} is a checkpoint of version {said['version']}, expected {VERSION}: {_ANEW}"
            )
        self.identity.refuse_other(said, path)
        return state, said["environment"]

    def resume(self, arm: Arm, saved: Saved) -> None:
        """Bring the new ``arm`` to where ``saved`` was written.

        ValueError: a state that does not fit this network, or this version of dynaprune."""
        try:
            resume_arm(arm, saved.state["arm"], saved.best)
            own = saved.state["checkpoints"]
            self._earlier, self.seconds, self.written = own["parts"], own["seconds"], own["written"]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{saved.path}, written by dynaprune {saved.environment['versions']['dynaprune']}, cannot be "
                f"continued ({type(error).__name__}: {error}): {_ANEW}"
            ) from error
        self._first_step, self._best = arm.done.steps, arm.done.best_epoch
        self._last = time.monotonic()


class _Damaged(Exception):
    """A file that is not as it was written; the message names it."""


def _identity_in(found: TensorFile) -> dict[str, Any]:
    said = json.loads(found.metadata.get(_METADATA, "null"), object_pairs_hook=unique_names)
    wanted = {"version": int, "arm": str, "config": dict, "data": str, "environment": dict}
    if not found.sealed or not isinstance(said, dict) or said.keys() != wanted.keys():
        raise ValueError("it is no checkpoint of an arm")
    for name, kind in wanted.items():
        if type(said[name]) is not kind:
            raise ValueError(f"its {name} is no {kind.__name__}")
    return said


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, identity: Identity, environment: Mapping[str, Any], *, every_seconds: float, restart: bool
) -> Iterator[Checkpoints]:
    """The checkpoints in ``folder``, held for this process; with ``restart`` those that are there go first.

    Raises:
        FolderInUse: another process writes the folder. OSError: a folder that cannot be made or written."""
    try:
        with sole_writer(folder):
            for left in folder.iterdir():  # by a process that was killed while it wrote
                if _LEFT.fullmatch(left.name):
                    left.unlink(missing_ok=True)
            if restart:
                remove_checkpoints(folder)
            yield Checkpoints(folder, identity, environment, every_seconds)
    finally:
        with contextlib.suppress(OSError):  # it holds checkpoints, or something else
            folder.rmdir()


def saved_steps(folder: Path) -> list[int]:
    """The numbers of steps after which ``folder`` has checkpoints, in order; they may be damaged."""
    return sorted(_numbered(folder, _STEP))


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint in ``folder``, and nothing else."""
    for names in (_STEP, _BEST):
        for path in _numbered(folder, names).values():
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _keep_newest(files: Mapping[int, Path], newest: int) -> None:
    """Remove all but file number ``newest`` and the one before it. What has a higher number is damaged, or of
    a course that this training has left."""
    kept = sorted(number for number in files if number <= newest)[-_KEPT:]
    for number in files.keys() - set(kept):
        files[number].unlink(missing_ok=True)


def _best_name(epoch: int) -> str:
    return f"best-{epoch:06d}.safetensors"


def _numbered(folder: Path, names: re.Pattern[str]) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    found = ((names.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}
