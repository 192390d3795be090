"""How far a pruning has come: what its report, its logs and its checks read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dynaprune.neurons.tracer import NeuronTracer
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.policy import Policy
from dynaprune.pruning.decide.trial import Trial
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.ledger import Ledger
from dynaprune.pruning.observe.observer import Observer
from dynaprune.pruning.observe.score import Score
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.removals import Removals
from dynaprune.pruning.settings import FLOPS


class Standing:
    """The parts of a pruner, and the figures that follow from them.

    Attributes:
        prepared: what the pruner is attached to, with its configuration.
        exempt: layers of the types to prune that stay dense, with the reason; the report has the others too.
        structure: the model with its pruned layers.
        steps: optimizer steps seen; with several optimizers, rounds in which each has stepped.
    """

    prepared: Prepared
    exempt: dict[str, str]
    structure: Structure
    trial: Trial | None
    policy: Policy
    score: Score
    tracer: NeuronTracer
    observer: Observer
    ledger: Ledger
    steps: int

    @property
    def config(self) -> PruningConfig:
        """The settings."""
        return self.prepared.config

    @property
    def model(self) -> nn.Module:
        """The model itself, without what is around it."""
        return self.structure.model

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers that train the model."""
        return self.structure.optimizers

    @property
    def layers(self) -> dict[str, BlockSparseLayer]:
        """The block-sparse layers that are pruned, by name."""
        return self.structure.modules

    @property
    def structure_version(self) -> int:
        """Grows with every structural change; early stopping restarts its patience on it."""
        return self.structure.version

    @property
    def compactions(self) -> int:
        """How often a layer's capacity was walked down."""
        return self.structure.compactions

    @property
    def history(self) -> list[dict[str, Any]]:
        """Step, sparsity and densities after every structural change."""
        return self.ledger.history

    def density(self) -> dict[str, float]:
        """Share of each layer's original weights that live."""
        return self.structure.density

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights, as they were at attach, that is gone."""
        return self.structure.sparsity

    @property
    def sparsity_of_model(self) -> float:
        """Share of all the model's parameters, as they were at attach, that is gone; each counts once."""
        return 1 - self.live_parameters / self.ledger.size.total

    @property
    def live_parameters(self) -> int:
        """Values that live: of block-sparse weights those of live blocks, of everything else all."""
        return self.structure.live_parameters

    @property
    def removals(self) -> Removals:
        """What has gone so far, by why it went."""
        ledger, trials = self.ledger, self.policy.trials
        return Removals(
            passed=ledger.passed,
            forced=ledger.forced,
            untested=ledger.untested,
            grown=ledger.grown,
            neurons=ledger.neurons,
            with_neurons=ledger.with_neurons,
            neurons_refused=dict(self.tracer.refused),
            events=[] if trials is None else list(trials.events),
        )

    @property
    def gone(self) -> float:
        """Share that is gone of what the target is a share of: weights or forward FLOPs."""
        return (self.structure.neurons.flops_gone or 0.0) if self.config.target_of == FLOPS else self.sparsity

    @property
    def target_reached(self) -> bool:
        """Whether as much is gone as the target asks for; never without one."""
        target, config = self.config.target_sparsity, self.config
        if config.stands_still and config.rewire:
            return True  # swaps keep the number of blocks, and those at an edge hold fewer weights
        return target is not None and self.gone >= target - 1e-9

    @property
    def structure_final(self) -> bool:
        """Whether the target is reached, or the schedule's end has passed."""
        return self.target_reached or self.policy.ended(self.steps)

    @property
    def final_standing(self) -> int:
        """0 while the structure is not final, 1 from the schedule's end on, 2 with the target reached.

        Of two models the one with the higher number is the better one.
        """
        return 2 if self.target_reached else int(self.structure_final)

    def nothing_left(self) -> bool:
        """Whether no event will change anything any more: then nothing needs to be observed either."""
        return self.policy.ended(self.steps) and (self.target_reached or self.config.target_sparsity is None)

    def probes_next(self) -> bool:
        """Whether the next step measures the dense gradient where no block lives."""
        return not self.nothing_left() and self.policy.probes(self.steps + 1)

    def figures(self) -> dict[str, float]:
        """Figures of the model as it is now, for a training's log. No host sync.

        - ``density``, ``sparsity``: share of the prunable layers' weights, as they were at first, that live,
          and that are gone.
        - ``sparsity_of_model``: share of all the model's parameters, as they were at first, that is gone.
        - ``live_parameters``: values that live: of block-sparse weights those of live blocks, else all.
        - ``flops_saving``: share of the prunable layers' multiplications, as they were at first, that is
          saved: weights gone times tokens seen; 0 before the first step.
        """
        seen, states = self.structure.tokens, self.structure.layers.values()
        full = sum(state.weights * seen.get(state.name, 0) for state in states)
        now = sum(state.live_weights * seen.get(state.name, 0) for state in states)
        for name, left in self.structure.neurons.left(self.model).items():
            full += self.structure.neurons.sizes[name] * seen.get(name, 0)
            now += left * seen.get(name, 0)
        return {
            "density": 1 - self.sparsity,
            "sparsity": self.sparsity,
            "sparsity_of_model": self.sparsity_of_model,
            "live_parameters": float(self.live_parameters),
            "flops_saving": 1 - now / full if full else 0.0,
        }


def say_what_is_missing(standing: Standing, others: Mapping[str, int]) -> None:
    """Warn where pruning ends short of its target, with what may have kept it from it.

    Args:
        others: steps that optimizers took which are not watched, by type.
    """
    config = standing.config
    target, total = config.target_sparsity, config.total_steps
    if target is None or standing.target_reached or not standing.structure.weights:
        return
    missing = ""
    if others:
        told = ", ".join(f"{count} of {name}" for name, count in others.items())
        missing = f"; it saw none of the steps of other optimizers ({told})"
    elif standing.steps < (total or 0):
        missing = ": were there fewer steps than total_steps (accumulation, an early end)?"
    of = f" and with {standing.gone:.1%} of the forward FLOPs gone" if config.target_of == FLOPS else ""
    warnings.warn(
        f"pruning ends at a sparsity of {standing.sparsity:.1%} ({standing.sparsity_of_model:.1%} of all "
        f"parameters){of}, short of the target's {target:.1%}, after "
        f"{standing.steps} of {total} optimizer steps{missing}",
        RuntimeWarning,
        stacklevel=4,
    )
