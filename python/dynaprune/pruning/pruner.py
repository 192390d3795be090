"""The ``Pruner``: what happens around every optimizer step of a training that is pruned.

From the optimizer's hook to the changed weights: ``_before`` sees the gradients, ``_complete`` counts the
step, and at an event :func:`~dynaprune.pruning.event.prune` asks the policy for edits and applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dynaprune.neurons.tracer import NeuronTracer
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.builtin import built_in_policy, tries_neurons
from dynaprune.pruning.checks.first_batch import FirstBatch
from dynaprune.pruning.checks.one_process import take_off_averaging_
from dynaprune.pruning.checks.other_optimizers import OtherOptimizers
from dynaprune.pruning.decide.trial import Trial
from dynaprune.pruning.edit.consistency import Consistency
from dynaprune.pruning.edit.exempt import exempt
from dynaprune.pruning.edit.finalize import finalize
from dynaprune.pruning.edit.followers import Copy
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.edit.neuron_units import NeuronUnits
from dynaprune.pruning.edit.stale_copies import watch_copies
from dynaprune.pruning.edit.structure import Structure
from dynaprune.pruning.event import prune
from dynaprune.pruning.ledger import Ledger
from dynaprune.pruning.observe.gradients import refuse_without_gradients
from dynaprune.pruning.observe.hooks import StepHooks
from dynaprune.pruning.observe.observer import Observer, read_probes
from dynaprune.pruning.observe.scores import make_score
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.report import report
from dynaprune.pruning.saved_state import adopt, check_state, state_of
from dynaprune.pruning.scaled_steps import ScaledSteps
from dynaprune.pruning.settings import BLOCKS
from dynaprune.pruning.standing import Standing, say_what_is_missing
from dynaprune.pruning.whole_model import model_size
from dynaprune.saving.reshape import add_structure_hooks


class Pruner(Standing):
    """Watches every optimizer step and removes what the training no longer needs; ``attach`` makes it."""

    def __init__(
        self,
        prepared: Prepared,
        optimizers: list[torch.optim.Optimizer],
        layers: Mapping[str, BlockSparseLayer],
        exempt: dict[str, str],
        trial: Trial | None,
        plain: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Watch from now on.

        Args:
            layers: the block-sparse layers that are pruned.
            plain: the plain layers whose neurons may go.
        """
        config, model = prepared.config, prepared.model
        self.prepared, self.exempt = prepared, exempt
        self.trial, self.steps = trial, 0
        left_out, rates = prepared.left_out, prepared.rates
        states = {n: LayerState.of(n, m, left_out.get(n, 0), rates.get(n, 1.0)) for n, m in layers.items()}
        self.structure = Structure(
            model, optimizers, states, NeuronUnits(dict(plain or {})), pretrained=prepared.pretrained
        )
        for name in () if prepared.pretrained is None else states.keys() & prepared.pretrained.weights.keys():
            states[name].wait()
        weights = {name: state.weights for name, state in self.structure.layers.items()}
        self.ledger = Ledger(model_size(model, layers, exempt, weights))
        self.policy = config.policy or built_in_policy(config, trial)
        self.score = make_score(config.score, seed=config.seed, decay=config.score_decay)
        self.score.attach(self.structure.layers)
        self.tracer = NeuronTracer(model, prepared.example, plain=config.units != BLOCKS)
        groups = config.units != BLOCKS or (tries_neurons(config, trial) and self.score.of_gates)
        self.observer = Observer(
            self.structure, self.score, self.tracer, every=config.observe_every, watches_groups=groups
        )
        self._consistency = Consistency(self.structure)
        self._others = OtherOptimizers(self.structure, self._where)
        self._first_batch = None if prepared.compared else FirstBatch(prepared.given, compares=not left_out)
        self._said: set[str] = set()
        watch_copies(self.layers)
        add_structure_hooks(model)
        self._hooks = self._watch()
        self.ledger.note_sizes(0, self.structure)
        self._prepare_next_step()

    def _watch(self) -> list[Any]:
        """Hook onto the optimizers; what is returned has ``remove()``."""
        if self._measures_gradients:
            for layer in self.layers.values():
                layer.enable_tap_(inputs=self.policy.swaps_by_gradient)
        holders, readers = self._holders(), self._readers()
        self._others.watch()
        return [
            ScaledSteps(self.structure),  # first: groups are whole again before an event
            StepHooks(holders, self._before, completed=self._complete),
            StepHooks(
                readers if self.observer.watches_groups else [], self._before_reader, refuse_in_backward=False
            ),
            *(
                each.register_load_state_dict_post_hook(lambda _: self._consistency.loaded())
                for each in self.optimizers
            ),
        ]

    def _holders(self) -> list[torch.optim.Optimizer]:
        return [each for each in self.optimizers if self.structure.holds(each)]

    def _readers(self) -> list[torch.optim.Optimizer]:
        return [each for each in self.optimizers if not self.structure.holds(each)]

    @property
    def _measures_gradients(self) -> bool:
        return self.policy.grows or self.policy.swaps_by_gradient

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are ready: look at them."""
        if self._first_batch is not None:
            self._check_first_batch(self._first_batch)
        layers = self.structure.held_by(optimizer)
        self._consistency.check_if_changed()
        refuse_without_gradients(self.structure.trained_by(optimizer), optimizer)
        if self.nothing_left():
            return
        self.observer.see(layers, optimizer, self.steps + 1)
        if self._measures_gradients:
            read_probes(layers, probing=self.policy.probes(self.steps + 1))

    def _before_reader(self, optimizer: torch.optim.Optimizer) -> None:
        # Before the first batch is checked it is not known which layers are pruned.
        if not self.nothing_left() and self._first_batch is None:
            self.observer.see_readers(optimizer, self.steps)

    def _complete(self) -> None:
        """Every optimizer that holds pruned weights has stepped."""
        self.steps += 1
        self.observer.step_done(self.policy.interval)
        if self.policy.due(self.steps) and not self.observer.observed.trouble:
            prune(self, self._consistency, self._said)
            for state in self.structure.layers.values():
                state.probe = None
        self.tracer.disarm()
        if self.nothing_left():
            for layer in self.layers.values():
                layer.disable_tap_()
        self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        """What has to be measured or captured in the next forward and backward pass."""
        working = not self.nothing_left()
        due = self.policy.due(self.steps + 1) and working
        if self._measures_gradients:
            for layer in self.layers.values():
                layer.probe.fill_(self.probes_next())
        looks = self.observer.watches_groups and self.observer.observes(self.steps + 1) and working
        if (due or (looks and self.tracer.current is None)) and self.config.neurons:
            self.tracer.arm()

    def _check_first_batch(self, batch: FirstBatch) -> None:
        """Before the first step: exempt layers that are read elsewhere, refuse a model that has changed.

        Raises:
            RuntimeError: the model computes something else with block-sparse layers, or none is left; it has
                plain layers again, and the pruner is detached.
        """
        self._forget_first_batch()
        try:
            batch.check(self.model, self.layers, self._exempt)
        except ValueError as error:
            self.finalize()
            raise RuntimeError(str(error)) from error

    def _exempt(self, reasons: Mapping[str, str]) -> None:
        """Prune the layers named no longer; they become dense."""
        for name, reason in reasons.items():
            if self.structure.layers[name].left_out:
                raise ValueError(
                    f"cannot prune this model: {name} began without some of its blocks, and {reason}. Begin "
                    "again with the layer excluded (PruningConfig(exclude=[...]))"
                )
        exempt(self.structure, reasons)
        self.ledger.exempt_later.update(reasons)
        self.exempt.update(reasons)
        self.score.detach()
        self.score.attach(self.structure.layers)
        self._consistency.loaded()
        self.tracer.forget()
        self.ledger.history.clear()
        self.ledger.note_sizes(self.steps, self.structure)

    def _forget_first_batch(self) -> None:
        if self._first_batch is not None:
            self._first_batch.remove()
            self._first_batch = None

    def _where(self) -> str:
        """Where pruning stands, for a warning; empty where nothing is left to do."""
        if self.nothing_left():
            return ""
        return f"step {self.steps} of {self.config.total_steps} with {self.sparsity:.1%} of the weights gone"

    def step(self) -> None:
        """Do by hand what the hooks do around a step: for replayed CUDA graphs, which run no hooks.

        Call it after each replay that contains a backward pass and an optimizer step.
        """
        self._forget_first_batch()
        for optimizer in self._holders():
            self._before(optimizer)
        for optimizer in self._readers():
            self._before_reader(optimizer)
        self._complete()

    def follow(self, copy: Copy) -> None:
        """Keep a copy of the weights in step with the model's structure from now on: averages, teachers.

        Call it once, right after making the copy (before or after attach), for every copy that goes on being
        updated.

        Args:
            copy: a deep copy of the model, or a module that holds one (``AveragedModel``); a dict of tensors
                by parameters' names, by names of the state dict or by Parameters; a list of tensors in the
                order of ``model.parameters()``. Tensors keep their places and may be replaced.

        Raises:
            TypeError, ValueError: not a copy of this model, or one whose structure has fallen behind already.
        """
        self.structure.followers.add(copy, self.model, self.layers)

    def measure(self) -> None:
        """Bring the numbers of live weights up to date. Syncs."""
        self.structure.measure()

    def report(self) -> dict[str, Any]:
        """What was removed, why, how it was tested and what it cost: plain values, fit for JSON."""
        return report(self)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's and the optimizer's: tensors, plain values."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved training; load the model's and the optimizer's state too, in any order.

        Raises:
            ValueError: the state of another model, score or trial.
        """
        names = set(self.structure.layers)
        later = {n: why for n, why in state.get("exempt_later", {}).items() if n in names}
        if later and set(state.get("slots", ())) == names - set(later):
            self._exempt(later)
        check_state(self, state)
        adopt(self, state)
        if self.steps > 0:
            self._forget_first_batch()
        self._prepare_next_step()
        self._consistency.loaded(dict(state["slots"]), state.get("widths"))

    def detach(self) -> None:
        """Stop watching and pruning; the model keeps its block-sparse layers.

        Warns where the target sparsity is not reached.
        """
        if self._hooks:
            say_what_is_missing(self, self._others.steps)
            self._others.unwatch()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.observer.stop_counting()
        self.score.detach()
        self.tracer.disarm()
        self._forget_first_batch()
        for layer in self.layers.values():
            layer.disable_tap_()
            layer.probe.fill_(False)
            layer.copy_watch.owned = False

    def finalize(self) -> nn.Module:
        """Detach, give the model plain layers again (smaller where neurons were cut), and return it.

        Optimizer state and gradients go back to the dense shapes too, and so do the copies that follow.
        """
        self.detach()
        if any(isinstance(module, BlockSparseLayer) for module in self.model.modules()):
            take_off_averaging_(self.model)
            finalize(self.structure)
        return self.prepared.given
