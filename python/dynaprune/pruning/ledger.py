"""What was done so far, counted from the edits that were carried out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynaprune.pruning.edit.edits import (
    FORCED,
    PASSED,
    UNTESTED,
    Cut,
    Edit,
    Grow,
    Release,
    Rewire,
    count_blocks,
)
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.whole_model import ModelSize

# Counts that every saved state has.
_FROM_THE_FIRST = ("passed", "forced", "untested", "grown", "neurons", "with_neurons")


@dataclass
class Ledger:
    """Counts of removals, in units, and the sizes after every change.

    Attributes:
        size: values in all the model's parameters, as they were at attach.
        passed, forced, untested: blocks that went, by why, and neurons that went as units of their own.
        grown: blocks that returned.
        swapped: blocks that went while as many began elsewhere in the layer: neither removed nor returned.
        neurons_passed, neurons_forced, neurons_untested: of these the neurons.
        neurons: neurons cut.
        with_neurons: live blocks that only read or made dead neurons and went along with them, which changes
            no output.
        history: step, sparsity and densities after every structural change.
        exempt_later: layers that turned out at the first batch to be none of the pruner's, with the reason.
        started: ``time.perf_counter()`` at attach.
    """

    size: ModelSize
    passed: int = 0
    forced: int = 0
    untested: int = 0
    grown: int = 0
    swapped: int = 0
    neurons_passed: int = 0
    neurons_forced: int = 0
    neurons_untested: int = 0
    neurons: int = 0
    with_neurons: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    exempt_later: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def record(self, edits: Iterable[Edit]) -> None:
        """Count what was carried out. Syncs."""
        for edit in edits:
            match edit:
                case Release(why=why):
                    assert why in (PASSED, FORCED, UNTESTED)
                    setattr(self, why, getattr(self, why) + count_blocks(edit.masks))
                case Grow():
                    self.grown += count_blocks(edit.masks)
                case Rewire():
                    self.swapped += count_blocks(edit.dropped)
                case Cut(why=why):
                    for reason, count in why.items():
                        for name in (reason, f"neurons_{reason}"):
                            setattr(self, name, getattr(self, name) + count)
                    self.neurons += sum(edit.found.neurons.values())
                    self.with_neurons += edit.found.blocks

    def note_sizes(self, step: int, structure: Structure, *, only_new: bool = False) -> None:
        """Measure the structure after a change, and note its sizes; with ``only_new`` not those that were
        noted last. Syncs."""
        structure.measure()
        if only_new and self.history and self.history[-1]["density"] == structure.density:
            return
        self.history.append({"step": step, "sparsity": structure.sparsity, "density": structure.density})

    @property
    def seconds(self) -> float:
        """Since attach, over all runs of a resumed training."""
        return time.perf_counter() - self.started

    def leave_out(self, seconds: float) -> None:
        """Count ``seconds`` that have just passed as no time of the training."""
        self.started += seconds

    def removals(self) -> dict[str, int]:
        """The counts, by name."""
        names = (*_FROM_THE_FIRST, "swapped", *(f"neurons_{why}" for why in (PASSED, FORCED, UNTESTED)))
        return {name: getattr(self, name) for name in names}

    def resume(self, counts: Mapping[str, int], history: Iterable[Mapping[str, Any]], seconds: float) -> None:
        """Go on from a saved training."""
        for name in self.removals():
            setattr(self, name, int(counts[name] if name in _FROM_THE_FIRST else counts.get(name, 0)))
        self.history = [dict(row) for row in history]
        self.started = time.perf_counter() - seconds
