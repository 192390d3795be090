"""States of a training on the disk: the newest few of a kind, each a safetensors file of its own.

A file lies under a checksum of all its bytes. The plain values of a state are JSON in a tensor of it
(``dynaprune.saving.carried``); JSON in its metadata says which training it is of. One that is damaged is
passed over for the one before it."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaprune.experiment.run_config import RunConfig, differing_settings
from dynaprune.saving.carried import from_tensors, to_tensors
from dynaprune.saving.tensor_file import TensorFile, read_tensors, unique_names, write_tensors

__all__ = ["ANEW", "Damaged", "Identity", "Saved", "StateFiles", "holds_states", "remove_states"]

VERSION = 1
ANEW = "--restart trains the arm from its start"
_METADATA = "dynaprune.arm"
_FILE = re.compile(r"([a-z]+)-(\d{9,})\.safetensors")
_LEFT = re.compile(rf"\.{_FILE.pattern}\..+\.tmp")


class Damaged(Exception):
    """A file that is not as it was written; the message names it."""


@dataclass(frozen=True)
class Identity:
    """Which training a state is of: only one of the same arm, settings and data goes on.

    ``data`` is the fingerprint of the data."""

    arm: str
    config: RunConfig
    data: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in a file."""
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
                f"or --checkpoints, or {ANEW}"
            )


@dataclass(frozen=True)
class Saved:
    """A state that was read: from which file, and the environment that it was written in."""

    path: Path
    state: dict[str, Any]
    environment: dict[str, Any]


class StateFiles:
    """The states of one kind in a folder, by number: the higher, the later in the training."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        identity: Identity,
        environment: Mapping[str, Any],
        *,
        every_seconds: float,
        kept: int = 2,
    ) -> None:
        """The newest ``kept`` stay. One is `due` ``every_seconds`` after the last, or after this was made."""
        self.folder, self.kind, self.identity = folder, kind, identity
        self._environment, self._every_seconds, self._kept = dict(environment), every_seconds, kept
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._last >= self._every_seconds

    def write(self, number: int, state: Mapping[str, Any]) -> None:
        """Write a state, and remove all but the newest up to it. What has a higher number is damaged, or of a
        course that this training has left.

        OSError: a disk that is full or read-only; earlier states stay."""
        said = {"version": VERSION, **self.identity.to_json(), "environment": self._environment}
        write_tensors(self._path(number), to_tensors(state), {_METADATA: json.dumps(said)})
        self._last = time.monotonic()
        numbers = self._numbers()
        kept = [each for each in numbers if each <= number][-self._kept :]
        for other in set(numbers) - set(kept):
            self._path(other).unlink(missing_ok=True)

    def newest(self, complete: Callable[[Saved], Any] = lambda saved: None) -> Saved | None:
        """The newest state that is whole; None where there is none at all. One that is passed over is named
        on stderr.

        Args:
            complete: reads what belongs to a state; where that is `Damaged`, so is the state.

        Raises:
            ValueError: a state of another training, or none that is whole."""
        damaged: list[str] = []
        for number in reversed(self._numbers()):
            try:
                saved = self.read(number)
                complete(saved)
            except Damaged as error:
                damaged.append(str(error))
                continue
            for said in damaged:
                print(f"{said}: going on from {saved.path.name}, the one before it", file=sys.stderr)
            return saved
        if damaged:
            raise ValueError(f"{'; '.join(damaged)}: no checkpoint is whole, and {ANEW}")
        return None

    def read(self, number: int) -> Saved:
        """One state.

        Raises:
            Damaged: a file that is not whole, or missing. ValueError: one of another training or format."""
        path = self._path(number)
        try:
            found = read_tensors(path)
            said = _said_by(found)
            state = from_tensors(found.tensors)
        except (ValueError, OSError) as error:
            raise Damaged(f"{path} cannot be read: {error}") from None
        if state is None:
            raise Damaged(f"{path} cannot be read: it holds no state")
        if said["version"] != VERSION:
            raise ValueError(
                f"{path} is a checkpoint of version {said['version']}, expected {VERSION}: {ANEW}"
            )
        self.identity.refuse_other(said, path)
        return Saved(path, state, said["environment"])

    def remove(self) -> None:
        """Remove all of this kind."""
        for number in self._numbers():
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.kind}-{number:09d}.safetensors"

    def _numbers(self) -> list[int]:
        return sorted(number for kind, number in _files(self.folder).values() if kind == self.kind)


def _said_by(found: TensorFile) -> dict[str, Any]:
    said = json.loads(found.metadata.get(_METADATA, "null"), object_pairs_hook=unique_names)
    wanted = {"version": int, "arm": str, "config": dict, "data": str, "environment": dict}
    if not found.sealed or not isinstance(said, dict) or said.keys() != wanted.keys():
        raise ValueError("it is no checkpoint of an arm")
    for name, kind in wanted.items():
        if type(said[name]) is not kind:
            raise ValueError(f"its {name} is no {kind.__name__}")
    return said


def holds_states(folder: Path) -> bool:
    """Whether ``folder`` holds states of a training, damaged ones included."""
    return bool(_files(folder))


def remove_states(folder: Path, *, only_unfinished: bool = False) -> None:
    """Remove all states in ``folder`` and nothing else, or what a process left that was killed while it
    wrote one."""
    if not folder.is_dir():
        return
    unfinished = [path for path in folder.iterdir() if _LEFT.fullmatch(path.name)]
    for path in [*unfinished, *([] if only_unfinished else _files(folder))]:
        path.unlink(missing_ok=True)


def _files(folder: Path) -> dict[Path, tuple[str, int]]:
    if not folder.is_dir():
        return {}
    found = ((path, _FILE.fullmatch(path.name)) for path in folder.iterdir())
    return {path: (match[1], int(match[2])) for path, match in found if match}
