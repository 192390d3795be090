"""An arm's checkpoints: its whole state now and then, and the best model of each time in a file beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaprune.experiment.arm import Arm
from dynaprune.experiment.arm_state import best_state, resume_arm, state_of_arm
from dynaprune.experiment.sole_writer import sole_writer
from dynaprune.experiment.state_files import ANEW, Identity, Saved, StateFiles, remove_states
from dynaprune.experiment.steps import now

__all__ = ["Checkpoint", "Checkpoints", "open_checkpoints"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read, and the state of the best model of then."""

    saved: Saved
    best: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of one arm in one folder.

    Attributes:
        environment: versions, processor and threads of this process.
        pretraining: states of a pretraining that comes before the arm's own.
        seconds: that were spent on writing checkpoints, in all parts of the training.
        written: how many there were.
    """

    def __init__(
        self, folder: Path, identity: Identity, environment: Mapping[str, Any], every_seconds: float
    ) -> None:
        self.folder, self.identity, self.environment = folder, identity, dict(environment)
        self._steps, self._best, self.pretraining = (
            StateFiles(folder, kind, identity, environment, every_seconds=every_seconds, kept=kept)
            for kind, kept in (("step", 2), ("best", 3), ("pretrain", 2))
        )
        self.seconds, self.written = 0.0, 0
        self._earlier: list[dict[str, Any]] = []
        self._steps_before = 0
        self._best_epoch: int | None = None
        self._started = time.monotonic()

    @property
    def parts(self) -> list[dict[str, Any]]:
        """One entry per process that trained the arm: the steps before it, its seconds and its machine."""
        here = {
            "steps_before": self._steps_before,
            "process_seconds": time.monotonic() - self._started,
            "environment": self.environment,
        }
        return [*self._earlier, here]

    def due(self) -> bool:
        """Whether the last checkpoint is so old that one should be written within the epoch."""
        return self._steps.due()

    def write(self, arm: Arm) -> None:
        """Write a checkpoint, and let go of all but the one before it. Its time counts as no training time.

        OSError: a disk that is full or read-only; earlier checkpoints stay."""
        begun = now(arm.state.device)
        best = arm.done.best_epoch
        if best is not None and best != self._best_epoch:
            self._best.write(best, best_state(arm))
            self._best_epoch = best
        own = {"parts": self.parts, "seconds": self.seconds, "written": self.written + 1}
        self._steps.write(arm.done.steps, {"arm": state_of_arm(arm), "checkpoints": own})
        self.written += 1
        spent = now(arm.state.device) - begun
        self.seconds += spent
        arm.leave_out(spent)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none at all.

        ValueError: a checkpoint of another training, or none that is whole."""
        best: list[dict[str, Any]] = []

        def read_best(saved: Saved) -> None:
            best.clear()
            epoch = saved.state["arm"]["outcome"]["best_epoch"]
            if epoch is not None:
                best.append(self._best.read(epoch).state)

        saved = self._steps.newest(read_best)
        return None if saved is None else Checkpoint(saved, best[0] if best else None)

    def resume(self, arm: Arm, checkpoint: Checkpoint) -> None:
        """Bring the new ``arm`` to where ``checkpoint`` was written.

        ValueError: a state that does not fit this network, or this version of dynaprune."""
        saved = checkpoint.saved
        try:
            resume_arm(arm, saved.state["arm"], checkpoint.best)
            own = saved.state["checkpoints"]
            self._earlier, self.seconds, self.written = own["parts"], own["seconds"], own["written"]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{saved.path}, written by dynaprune {saved.environment['versions']['dynaprune']}, cannot be "
                f"continued ({type(error).__name__}: {error}): {ANEW}"
            ) from error
        self._steps_before, self._best_epoch = arm.done.steps, arm.done.best_epoch


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, identity: Identity, environment: Mapping[str, Any], *, every_seconds: float, restart: bool
) -> Iterator[Checkpoints]:
    """The checkpoints in ``folder``, held for this process; with ``restart`` those that are there go first.

    Raises:
        FolderInUse: another process writes the folder. OSError: a folder that cannot be made or written."""
    try:
        with sole_writer(folder):
            remove_states(folder, only_unfinished=not restart)
            yield Checkpoints(folder, identity, environment, every_seconds)
    finally:
        with contextlib.suppress(OSError):  # it holds checkpoints, or something else
            folder.rmdir()
