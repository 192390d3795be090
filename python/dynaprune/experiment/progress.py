"""Progress of one arm: a bar on a terminal, otherwise a line every few epochs."""

from __future__ import annotations

import sys
from typing import Any

from dynaprune.experiment.tasks.metric import Metric

__all__ = ["EpochProgress"]

_LINES = 10


class EpochProgress:
    """A context manager that shows steps as a bar (stderr is a terminal) or about ten lines a run (it is
    not). ``metric`` stands beside the validation loss."""

    def __init__(self, arm: str, epochs: int, steps: int, metric: Metric, *, quiet: bool = False) -> None:
        self.arm, self.epochs, self.steps, self.metric = arm, epochs, steps, metric
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> EpochProgress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description:>9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.arm, total=self.steps, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        """So many further steps are done."""
        if self._bar is not None:
            self._bar.advance(self._task, steps)

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done: ``row`` is its line of ``history.csv``."""
        form = ".3f" if self.metric.unit == "share" else ".4g"
        note = (
            f"epoch {row['epoch']}/{self.epochs}  validation loss {row['validation_loss']:.4f}, "
            f"{self.metric.label} {row[f'validation_{self.metric.name}']:{form}}"
        )
        if row["sparsity"]:
            note += f"  sparsity {row['sparsity']:.3f} ({row['sparsity_of_model']:.3f} of all parameters)"
        if self._bar is not None:
            self._bar.update(self._task, note=note)
        elif not self.quiet and (row["epoch"] == 1 or row["epoch"] % max(1, self.epochs // _LINES) == 0):
            print(f"{self.arm:>9}  {note}", file=sys.stderr, flush=True)
