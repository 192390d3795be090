"""What a pruner sees of training: gradients, probes, tokens, and the figures that are made of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from dynaprune.neurons.tracer import NeuronTracer
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.observe.gradients import LASTING, Observed, is_skipped, observe, observe_plain
from dynaprune.pruning.observe.score import Score
from dynaprune.pruning.observe.tokens import TokenCounter, observation_period

NOT_KNOWN_YET = 0


class Observer:
    """Shows the score, and the groups of neurons, the gradients of every :attr:`every`-th step.

    Attributes:
        observed: what was seen so far.
        every: observe every so many steps; 0 before the first step, when the cost is not known yet.
        watches_groups: whole neurons are scored by their readers' gradients.
    """

    def __init__(
        self,
        structure: Structure,
        score: Score,
        tracer: NeuronTracer,
        *,
        every: int | None,
        watches_groups: bool,
    ) -> None:
        self._structure, self._score, self._tracer = structure, score, tracer
        self.observed = Observed()
        self.every = every or NOT_KNOWN_YET
        self.watches_groups = watches_groups
        self._counter: TokenCounter | None = TokenCounter(structure.model)
        self._steps_at_start = 0
        self._read_steps: dict[torch.optim.Optimizer, int] = {}

    def observes(self, step: int) -> bool:
        """Whether step number ``step`` is observed."""
        return self.every == NOT_KNOWN_YET or step % self.every == 0

    def see(self, layers: Sequence[LayerState], optimizer: torch.optim.Optimizer, step: int) -> None:
        """Before the optimizer's step number ``step``: take in the gradients of its layers."""
        if self.observes(step):
            before = self.observed.trouble
            if layers:
                shown = observe(layers, self._score, optimizer, self.observed)
            else:
                plain = self._structure.trained_by(optimizer)
                shown = observe_plain(plain, optimizer, self.observed)
            self._see_groups(optimizer, step, shown=shown)
            self._say_trouble(before, step)

    def see_readers(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Before the step of an optimizer that holds no prunable weight, but maybe readers of neurons.

        Args:
            steps: that the pruner has counted.
        """
        # It steps before or after the others complete theirs: its own count says which step it is in.
        step = self._read_steps.get(optimizer, self._steps_at_start) + 1
        step = min(max(step, steps), steps + 1)
        self._read_steps[optimizer] = step
        self._see_groups(optimizer, step, shown=not is_skipped(optimizer))

    def _see_groups(self, optimizer: torch.optim.Optimizer, step: int, *, shown: bool) -> None:
        """Show the groups the gradients that this optimizer holds, at observed steps or to complete one."""
        structure, groups = self._structure, self._structure.groups
        if not self.watches_groups or not (self.observes(step) or groups.waiting(step)):
            return
        if not shown:
            groups.drop_parts()
            return
        neuron_map = self._tracer.current or self._tracer.groups()
        if neuron_map is not None:
            started = time.perf_counter()
            groups.watch(structure.model, neuron_map, structure.optimizers)
            owner = structure.optimizers.index(optimizer)
            scale = getattr(optimizer, "grad_scale", None)
            groups.observe(structure.model, owner, self._score, step=step, scale=scale)
            self.observed.seconds += time.perf_counter() - started

    def _say_trouble(self, before: str, step: int) -> None:
        """Warn where gradients stop being usable for good, and where they are again."""
        now = self.observed.trouble
        if now and not before:
            said = (
                f"the gradients of the prunable weights are {now} in {LASTING} observations up to step {step}"
            )
            warnings.warn(f"{said}: nothing is removed until they are usable", RuntimeWarning, stacklevel=5)
        elif before and not now:
            said = f"the gradients of the prunable weights are usable again at step {step}: pruning goes on"
            warnings.warn(said, RuntimeWarning, stacklevel=5)

    def step_done(self, interval: int) -> None:
        """After the first step, know how many tokens layers see, and how often to look.

        Args:
            interval: steps between pruning events.
        """
        structure = self._structure
        if self._counter is not None:
            structure.tokens = dict(self._counter.tokens)
            structure.note_step_flops()
            self.stop_counting()
        if self.every == NOT_KNOWN_YET:
            read = structure.groups.read(structure.model).values()
            plain = structure.neurons.parameters()
            self.every = observation_period(
                structure.layers.values(), structure.tokens, interval, read, plain
            )

    def stop_counting(self) -> None:
        """Take the counting hooks off."""
        if self._counter is not None:
            self._counter.stop()
            self._counter = None

    def resume(self, observed: Observed, every: int, steps: int) -> None:
        """Go on from a saved training of ``steps`` steps."""
        self.observed, self.every = observed, every
        self._steps_at_start = steps
        self._read_steps.clear()
        if steps > 0:
            self.stop_counting()


def read_probes(layers: Sequence[LayerState], *, probing: bool) -> None:
    """Clear the layers' taps; with ``probing`` keep what they measured of the dense gradient."""
    # Norms are of scaled gradients under a GradScaler. All share one scale, and only their order is used.
    for state in layers:
        tap = state.layer.tap
        if tap is not None and tap.grad is not None:
            if probing:
                state.probe = _norms(tap.grad).view_as(state.mask)
            tap.grad = None


def _norms(measured: Tensor) -> Tensor:
    """The probe's norms, over the inputs' mean squares where the tap has these: 0 where an input is 0."""
    if measured.shape[0] < 3:
        return measured[1].clone()
    return torch.where(measured[2] > 0, measured[1] / measured[2], 0)
