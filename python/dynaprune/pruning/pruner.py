"""The ``Pruner``: what happens around every optimizer step of a training that is pruned."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynaprune.neurons.example_inputs import ExampleInputs, InputCapture
from dynaprune.neurons.groups import NeuronMap
from dynaprune.nn import BlockSparseLayer, swap_back
from dynaprune.nn.block_sparse import as_it_is
from dynaprune.nn.optimizer_state import check_state_shapes, rewrite_state
from dynaprune.pruning.checks.first_batch import FirstBatch, check_first_batch
from dynaprune.pruning.checks.one_process import take_off_averaging_
from dynaprune.pruning.checks.other_optimizers import (
    OtherOptimizers,
    unwatch_other_optimizers,
    watch_other_optimizers,
)
from dynaprune.pruning.checks.reachable import say_what_gets_no_gradient
from dynaprune.pruning.checks.recompilation import say_recompilations
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.growth import Protection
from dynaprune.pruning.decide.pace import CubicPace, Pace, SelfPaced
from dynaprune.pruning.decide.trial import Evaluation, TrialRules, TrialState, minimum_interval
from dynaprune.pruning.edit.followers import Copy, Followers
from dynaprune.pruning.edit.stale_copies import watch_copies
from dynaprune.pruning.events import Removals, block_weights, neuron_map_of, run_pruning_event
from dynaprune.pruning.observe.gradients import (
    LASTING,
    Observed,
    RowCounter,
    StepHooks,
    is_skipped,
    observation_period,
    observe,
    refuse_without_gradients,
)
from dynaprune.pruning.observe.group_score import GroupScores
from dynaprune.pruning.observe.score import make_score
from dynaprune.pruning.reporting import load_pruner_state, pruner_state, report
from dynaprune.pruning.whole_model import ModelSize, model_size
from dynaprune.saving.reshape import add_structure_hooks

EVENTS_WANTED, EVENTS_AT_LEAST = 20, 10
SELF_PACED_INTERVAL = 50
NOT_OBSERVED_YET = 0
Trial = Callable[[], Evaluation]


class _PaceWithInterval(Pace, Protocol):
    interval: int


class Pruner:
    """Watches every optimizer step and removes what the training no longer needs; ``attach`` makes it.

    Attributes:
        layers: the block-sparse layers that are pruned, by name.
        exempt: layers of the types to prune that stay dense, with the reason; the report has the others too.
        size_at_attach: values in all the model's parameters, as they were at attach.
        steps: optimizer steps seen; with several optimizers, rounds in which each has stepped.
        given: what was given to attach: the model, or what is around it.
        batches_unseen: events that would have cut neurons, but had no batch to trace the model with.
        other_optimizers: what optimizers that are not watched did with the pruned weights.
        structure_version: grows with every structural change; early stopping restarts its patience on it.
    """

    def __init__(
        self,
        given: nn.Module,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        layers: dict[str, BlockSparseLayer],
        exempt: dict[str, str],
        config: PruningConfig,
        trial: Trial | None,
        example: ExampleInputs | None,
        checked: bool = False,
    ) -> None:
        self.given, self.model, self.optimizers = given, model, optimizers
        self.layers, self.exempt, self.config = layers, exempt, config
        self.trial = trial
        self._example = example
        self._capture = InputCapture(model)
        self.exempt_later: dict[str, str] = {}
        self._first_batch: FirstBatch | None = None if checked else FirstBatch(given)
        self.neuron_map: NeuronMap | None = None
        self.rules = TrialRules(
            config.threshold, config.tolerance, config.absolute_tolerance, config.allowance, config.classes
        )
        self.trial_state = TrialState()
        self.score = make_score(config.score, seed=config.seed, decay=config.score_decay)
        self.score.attach(layers)
        self.groups = GroupScores()
        self.pace = make_pace(config, trial)
        self.protection, self.followers = Protection(), Followers()
        self.removals, self.observed = Removals(), Observed()
        self.probes: dict[str, Tensor] = {}
        self.original_shapes = {name: dense_shape(layer) for name, layer in layers.items()}
        self._blocks = {name: layer.layout.blocks for name, layer in layers.items()}
        self.units_total = sum(self._blocks.values())
        weights = {name: math.prod(shape) for name, shape in self.original_shapes.items()}
        self.size_at_attach = model_size(model, layers, exempt, weights)
        self.steps = self.structure_version = self.compactions = 0
        self.observe_every = config.observe_every or NOT_OBSERVED_YET
        self.history: list[dict[str, Any]] = []
        self.live_weights: dict[str, int] = {}
        self._owners = self._layers_by_optimizer()
        self._stepped: set[int] = set()
        self._shapes: list[torch.Size] = []
        self._loaded_slots: dict[str, Tensor] | None = None
        self.started = time.perf_counter()
        self._rows: RowCounter | None = RowCounter(model)
        self.rows: dict[str, int] = {}
        watch_copies(layers)
        add_structure_hooks(model)
        if config.regrow > 0:
            for layer in layers.values():
                layer.enable_tap_()
        self._hooks: StepHooks | None = StepHooks(list(self._owners), self._before, self._after)
        self._steps_at_start, self._read_steps = 0, dict[torch.optim.Optimizer, int]()
        self._others = [each for each in self.optimizers if each not in self._owners]
        self._reading: StepHooks | None = StepHooks(
            self._others if self.watches_groups else [], self._read_groups, refuse_in_backward=False
        )
        self.other_optimizers = OtherOptimizers()
        watch_other_optimizers(self)
        self.batches_unseen = 0
        self._idle_said = self._recompilations_said = False
        self._loads = [each.register_load_state_dict_post_hook(self._loaded) for each in optimizers]
        self.record_structure()
        self._prepare_next_step()

    def _layers_by_optimizer(self) -> dict[torch.optim.Optimizer, dict[str, BlockSparseLayer]]:
        owners: dict[torch.optim.Optimizer, dict[str, BlockSparseLayer]] = {}
        for optimizer in self.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            mine = {name: layer for name, layer in self.layers.items() if id(layer.values) in held}
            if mine:
                owners[optimizer] = mine
        return owners

    @property
    def tries_neurons(self) -> bool:
        """Whether events put whole neurons first."""
        return self.config.neurons and self.config.allocation == "global" and self.trial is not None

    @property
    def watches_groups(self) -> bool:
        """Whether the score of whole neurons is made of their readers' gradients."""
        return self.tries_neurons and self.score.of_gates

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        if self._first_batch is not None:
            batch, self._first_batch = self._first_batch, None
            check_first_batch(self, batch)
        layers = self._owners[optimizer]
        if not all(isinstance(layer, BlockSparseLayer) for layer in layers.values()):
            self.check_state()
        refuse_without_gradients(layers, optimizer)
        shapes = [layer.values.shape for layer in self.layers.values()]
        if shapes != self._shapes:
            self.check_state()
        step = self.steps + 1
        if self.nothing_left():
            return
        if self._observes(step):
            before = self.observed.trouble
            shown = observe(layers, self.score, optimizer, self.observed)
            self._observe_groups(optimizer, step, shown=shown)
            self._say_trouble(before, step)
        if self.config.regrow > 0:
            self._read_taps(layers, probing=self.pace.due(step))

    def _observes(self, step: int) -> bool:
        return self.observe_every == NOT_OBSERVED_YET or step % self.observe_every == 0

    def _read_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the step of an optimizer that holds no prunable weight, but maybe readers of neurons."""
        # It steps before or after the others complete theirs: its own count says which step it is in.
        step = self._read_steps.get(optimizer, self._steps_at_start) + 1
        step = min(max(step, self.steps), self.steps + 1)
        self._read_steps[optimizer] = step
        # Before the first batch is checked it is not known which layers are pruned.
        if not self.nothing_left() and self._first_batch is None:
            self._observe_groups(optimizer, step, shown=not is_skipped(optimizer))

    def _observe_groups(self, optimizer: torch.optim.Optimizer, step: int, *, shown: bool) -> None:
        """Show the groups the gradients that this optimizer holds, at observed steps or to complete one."""
        if not self.watches_groups or not (self._observes(step) or self.groups.waiting(step)):
            return
        if not shown:
            self.groups.drop_parts()
            return
        neuron_map = self.neuron_map if self.neuron_map is not None else neuron_map_of(self)
        if neuron_map is not None:
            started = time.perf_counter()
            self.groups.watch(self.model, neuron_map, self.optimizers)
            owner, scale = self.optimizers.index(optimizer), getattr(optimizer, "grad_scale", None)
            self.groups.observe(self.model, owner, self.score, step=step, scale=scale)
            self.observed.seconds += time.perf_counter() - started

    def _read_taps(self, layers: Mapping[str, BlockSparseLayer], *, probing: bool) -> None:
        # Norms are of scaled gradients under a GradScaler. All share one scale, and only their order is used.
        for name, layer in layers.items():
            tap = layer.tap
            if tap is not None and tap.grad is not None:
                if probing:
                    self.probes[name] = tap.grad[1].view(layer.layout.rows, layer.layout.columns).clone()
                tap.grad = None

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._owners):
            self._stepped.clear()
            self._complete()

    def _complete(self) -> None:
        self.steps += 1
        if self._rows is not None:
            self.rows = dict(self._rows.rows)
            self._rows.stop()
            self._rows = None
        if self.observe_every == NOT_OBSERVED_YET:
            read = self.groups.read(self.model)
            self.observe_every = observation_period(self.layers, self.rows, self.pace.interval, read)
        if self.pace.due(self.steps) and not self.observed.trouble:
            self._run_event()
            self.probes.clear()
        self._capture.remove()
        if self.nothing_left():
            for layer in self.layers.values():
                layer.disable_tap_()
        self._prepare_next_step()

    def _run_event(self) -> None:
        take_off_averaging_(self.model)
        if not self._idle_said and self.observed.observations >= LASTING:
            self._idle_said = True
            say_what_gets_no_gradient(self)
        shapes = [layer.values.shape for layer in self.layers.values()]
        with torch.no_grad():
            run_pruning_event(self)
        if not self._recompilations_said and shapes != [layer.values.shape for layer in self.layers.values()]:
            self._recompilations_said = say_recompilations(self)

    def _prepare_next_step(self) -> None:
        due_next = self.pace.due(self.steps + 1) and not self.nothing_left()
        if self.config.regrow > 0:
            for layer in self.layers.values():
                layer.probe.fill_(due_next)
        groups_next = (
            self.watches_groups
            and self.neuron_map is None
            and self._observes(self.steps + 1)
            and not self.nothing_left()
        )
        if (due_next or groups_next) and self.config.neurons and self._example is None:
            self._capture.arm()

    def example(self) -> ExampleInputs | None:
        """What the model takes: as given to attach, or the last training batch before this event."""
        return self._example or self._capture.example

    def step(self) -> None:
        """Do by hand what the hooks do around a step: for replayed CUDA graphs, which run no hooks.

        Call it after each replay that contains a backward pass and an optimizer step.
        """
        self._forget_first_batch()
        for optimizer in self._owners:
            self._before(optimizer)
        for optimizer in self._others:
            self._read_groups(optimizer)
        self._complete()

    def _forget_first_batch(self) -> None:
        if self._first_batch is not None:
            self._first_batch.remove()
            self._first_batch = None

    def forget_layers(self, reasons: Mapping[str, str]) -> None:
        """Prune the layers named no longer; they are dense, or become so."""
        for name in reasons:
            del self.layers[name]
            self.units_total -= self._blocks.pop(name)
            for figures in (self.original_shapes, self.live_weights, self.rows, self.probes):
                figures.pop(name, None)
        self.exempt_later.update(reasons)
        self.exempt.update(reasons)
        for optimizer, layers in self._owners.items():
            self._owners[optimizer] = {n: layer for n, layer in layers.items() if n in self.layers}
        self.score.detach()
        self.score.attach(self.layers)
        self._shapes, self.neuron_map, self.history = [], None, []
        self.groups.stop()
        self.record_structure()

    def check_state(self) -> None:
        """Raise RuntimeError where the optimizers' state, or a loaded one, does not fit the structure."""
        for name, layer in self.layers.items():
            if self.model.get_submodule(name) is not layer or not isinstance(layer, BlockSparseLayer):
                raise RuntimeError(
                    f"layer {name} is no longer the one that this pruner was attached to: a state of another "
                    "kind was loaded, or the layer was replaced; attach again"
                )
        check_state_shapes(
            self.optimizers, [(f"{name}.values", layer.values) for name, layer in self.layers.items()]
        )
        if self._loaded_slots is not None:
            for name, slots in self._loaded_slots.items():
                mine = self.layers[name].layout.slot_of_block
                if slots.shape != mine.shape or not torch.equal(slots.to(mine.device), mine):
                    raise RuntimeError(
                        f"the pruner's state was saved with another structure of {name} than the model has "
                        "now: load the model's, the optimizer's and the pruner's state of the same moment"
                    )
            self._loaded_slots = None
        self._shapes = [layer.values.shape for layer in self.layers.values()]

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Take over the pruner's own figures of a ``state_dict``."""
        if int(state["steps"]) > 0:
            self._forget_first_batch()
        self.steps, self.structure_version = int(state["steps"]), int(state["structure_version"])
        self.compactions, self.observe_every = int(state["compactions"]), int(state["observe_every"])
        self.started = time.perf_counter() - float(state["seconds"])
        self.rows = dict(state["rows"])
        if self._rows is not None and self.steps > 0:
            self._rows.stop()
            self._rows = None
        self.removals = Removals(**{**state["removals"], "events": list(state["removals"]["events"])})
        self.observed = Observed(**{**state["observed"], "layers": set(state["observed"]["layers"])})
        self.history = [dict(row) for row in state["history"]]
        self.live_weights = dict(state["live_weights"])
        self.original_shapes = {name: tuple(shape) for name, shape in state["original_shapes"].items()}
        self.units_total = int(state["units_total"])
        if "size_at_attach" in state:  # states of earlier versions have none
            self.size_at_attach = ModelSize(**state["size_at_attach"])
        self.neuron_map = None
        self._steps_at_start = self.steps
        self._read_steps.clear()
        self.groups.load_state_dict(state.get("groups", {}))
        self._prepare_next_step()
        self._loaded_slots, self._shapes = dict(state["slots"]), []

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        self._shapes = []

    def units_live(self) -> int:
        """Live units: the share of weights that live, in blocks of average size, rounded up."""
        total = sum(math.prod(shape) for shape in self.original_shapes.values())
        return math.ceil(sum(self.live_weights.values()) / total * self.units_total - 1e-6)

    def unit_costs(self) -> dict[str, float]:
        """FLOPs per training step that one block of each layer costs."""
        return {
            name: 6.0 * layer.values.shape[1] * layer.values.shape[2] * max(self.rows.get(name, 0), 1)
            for name, layer in self.layers.items()
        }

    def measure(self) -> None:
        """Bring :attr:`live_weights` up to date. Syncs."""
        for name, layer in self.layers.items():
            self.live_weights[name] = int((block_weights(layer) * layer.layout.mask).sum().item())

    def record_structure(self) -> None:
        """Measure after a structural change and note sizes in the history."""
        self.measure()
        density = self.density()
        self.history.append({"step": self.steps, "sparsity": self.sparsity, "density": density})

    def density(self) -> dict[str, float]:
        """Share of each layer's original weights that live."""
        return {
            name: live / math.prod(self.original_shapes[name]) for name, live in self.live_weights.items()
        }

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights, as they were at attach, that is gone."""
        return 1 - sum(self.live_weights.values()) / sum(math.prod(s) for s in self.original_shapes.values())

    @property
    def sparsity_of_model(self) -> float:
        """Share of all the model's parameters, as they were at attach, that is gone; each counts once."""
        return 1 - self.live_parameters / self.size_at_attach.total

    @property
    def live_parameters(self) -> int:
        """Values that live: of block-sparse weights those of live blocks, of everything else all."""
        swapped = {id(layer.values) for layer in self.layers.values()}
        rest = sum(p.numel() for p in self.model.parameters() if id(p) not in swapped)
        return rest + sum(self.live_weights.values())

    @property
    def target_reached(self) -> bool:
        """Whether the sparsity is at least the target; never without one."""
        target = self.config.target_sparsity
        return target is not None and self.sparsity >= target - 1e-9

    @property
    def structure_final(self) -> bool:
        """Whether the target is reached, or the schedule's end has passed."""
        return self.target_reached or self.pace.ended(self.steps)

    def nothing_left(self) -> bool:
        """Whether no event will change anything any more: then nothing needs to be observed either."""
        return self.pace.ended(self.steps) and (self.target_reached or self.config.target_sparsity is None)

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
        self.followers.add(copy, self.model, self.layers)

    def report(self) -> dict[str, Any]:
        """What was removed, why, how it was tested and what it cost: plain values, fit for JSON."""
        return report(self)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model's and the optimizer's: tensors, plain values."""
        return pruner_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved training; load the model's and the optimizer's state too, in any order.

        Raises:
            ValueError: the state of another model, score or trial.
        """
        load_pruner_state(self, state)

    def detach(self) -> None:
        """Stop watching and pruning; the model keeps its block-sparse layers.

        Warns where the target sparsity is not reached.
        """
        if self._hooks is not None:
            self._say_unreached()
            self._hooks.remove()
            self._hooks = None
            unwatch_other_optimizers(self)
        if self._reading is not None:
            self._reading.remove()
            self._reading = None
        for handle in self._loads:
            handle.remove()
        self._loads = []
        if self._rows is not None:
            self._rows.stop()
            self._rows = None
        self.score.detach()
        self._capture.remove()
        self._forget_first_batch()
        for layer in self.layers.values():
            layer.disable_tap_()
            layer.probe.fill_(False)
            layer.copy_watch.owned = False

    def _say_trouble(self, before: str, step: int) -> None:
        """Warn where gradients stop being usable for good, and where they are again."""
        now = self.observed.trouble
        if now and not before:
            said = (
                f"the gradients of the prunable weights are {now} in {LASTING} observations up to step {step}"
            )
            warnings.warn(f"{said}: nothing is removed until they are usable", RuntimeWarning, stacklevel=4)
        elif before and not now:
            said = f"the gradients of the prunable weights are usable again at step {step}: pruning goes on"
            warnings.warn(said, RuntimeWarning, stacklevel=4)

    def _say_unreached(self) -> None:
        target, total = self.config.target_sparsity, self.config.total_steps
        if target is None or self.target_reached:
            return
        others = ", ".join(f"{count} of {name}" for name, count in self.other_optimizers.steps.items())
        missing = ""
        if others:
            missing = f"; it saw none of the steps of other optimizers ({others})"
        elif self.steps < (total or 0):
            missing = ": were there fewer steps than total_steps (accumulation, an early end)?"
        warnings.warn(
            f"pruning ends at a sparsity of {self.sparsity:.1%} ({self.sparsity_of_model:.1%} of all "
            f"parameters), short of the target's {target:.1%}, after "
            f"{self.steps} of {total} optimizer steps{missing}",
            RuntimeWarning,
            stacklevel=3,
        )

    def finalize(self) -> nn.Module:
        """Detach, give the model plain layers again (smaller where neurons were cut), and return it.

        Optimizer state and gradients go back to the dense shapes too, and so do the copies that follow.
        """
        self.detach()
        if not any(isinstance(module, BlockSparseLayer) for module in self.model.modules()):
            return self.given
        take_off_averaging_(self.model)
        with torch.no_grad():
            for layer in self.layers.values():
                rewrite_state(self.optimizers, layer.values, layer.to_dense_shape)
            self.followers.swap_back(self.model, self.layers)
            self.layers = {name: as_it_is(layer) for name, layer in self.layers.items()}
            swap_back(self.model)
        return self.given


def make_pace(config: PruningConfig, trial: Any) -> _PaceWithInterval:
    """The pace that the configuration asks for, with its default interval."""
    samples = getattr(trial, "samples", None)
    affordable = 1
    if isinstance(samples, int) and config.batch_size is not None:
        affordable = minimum_interval(samples, config.batch_size, config.rungs)
    steps = config.total_steps
    if config.target_sparsity is None:
        start = 0 if steps is None else math.floor(config.start * steps)
        end = None if steps is None else max(start + 1, math.floor(config.end * steps))
        interval = config.interval or max(SELF_PACED_INTERVAL, affordable)
        return SelfPaced(interval, config.self_paced_share, start_step=start, end_step=end)
    assert steps is not None
    ramp = max(1, math.floor(config.end * steps) - math.floor(config.start * steps))
    interval = config.interval or max(1, ramp // EVENTS_WANTED, min(affordable, ramp // EVENTS_AT_LEAST))
    return CubicPace(config.target_sparsity, config.start, config.end, steps, interval)


def dense_shape(layer: BlockSparseLayer) -> tuple[int, ...]:
    """Shape of the dense weight that the layer stands for."""
    layout = layer.layout
    if layout.conv is None:
        return (layout.out_features, layout.in_features)
    return (
        layout.out_features,
        layout.in_features // layout.conv.groups,
        layout.conv.kernel_h,
        layout.conv.kernel_w,
    )
