"""The network of an arm while it trains: the one place where the training loop meets the pruner."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynaprune.experiment.counted_trial import CountedTrial
from dynaprune.experiment.length import total_steps
from dynaprune.experiment.mask_record import MaskRecord
from dynaprune.experiment.metrics import median_seconds
from dynaprune.experiment.report import (
    AUDIT_FAILED,
    AUDITED,
    EVER_LIVED,
    NEVER_PRESENT,
    OF_NEURONS,
    REMOVALS,
    SWAPPED,
)
from dynaprune.experiment.steps import TrainState, time_in_turn
from dynaprune.experiment.tasks import TaskData
from dynaprune.experiment.tasks.data import batches, training_batches
from dynaprune.nn.to_device import to_device
from dynaprune.pruning.pruner import Pruner

__all__ = ["DenseNetwork", "PrunedNetwork"]

# After so many steps a batch norm's running statistics (momentum 0.1) hold less than 1% of what they were.
_STATISTICS_SETTLED = 50
_RECALIBRATION_BATCH, _RECALIBRATION_SAMPLES = 128, 1024
_TRIAL_BATCH = 256


class DenseNetwork:
    """A network that keeps its size: the baseline arm."""

    pruner: Pruner | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters_total = sum(p.numel() for p in model.parameters())

    def version(self) -> int:
        """Changes whenever the network's shapes or live blocks do."""
        return 0

    def event_next(self) -> bool:
        """Whether the next step ends with a pruning event."""
        return False

    def after_step(self, step: int) -> None:
        """Called after every training step, with the number of steps done."""

    def before_evaluation(self) -> None:
        """Called before the network is evaluated."""

    def target_reached(self) -> bool:
        """Whether the network is as small as it was to become."""
        return True

    def final_standing(self) -> int:
        """How final the size is, for `EarlyStopping`."""
        return 2

    def sparsity(self) -> float:
        """Share of the prunable weights that are gone."""
        return 0.0

    def sparsity_of_model(self) -> float:
        """Share of all parameters that are gone."""
        return 0.0

    def parameters_active(self) -> int:
        """Number of live parameter values."""
        return self.parameters_total

    def trial_flops(self) -> float:
        """FLOPs spent in trials so far."""
        return 0.0

    def probes(self) -> bool:
        """Whether the next step measures the dense gradient where no block lives."""
        return False

    def facts(self) -> dict[str, Any]:
        """What the report says of the network as it is now."""
        return {"parameters_total": self.parameters_total, "parameters_active": self.parameters_active()}

    def end_of_training(self) -> dict[str, Any]:
        """What the report says of the whole training."""
        return {}

    def step_times(self, batches: Iterator[tuple[Any, torch.Tensor]] | None) -> dict[str, Any]:
        """What the report says of step times beside those of the closing steps; ``batches`` None: no further
        steps."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs of the network beside its model: tensors and plain values."""
        return {}

    def leave_out(self, seconds: float) -> None:
        """Count ``seconds`` that have just passed as no time of the training."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved `state_dict`; the model's structure and weights are loaded afterwards."""

    def write(self, out: Path, tested: nn.Module) -> None:
        """Write what the pictures need, and the model that was tested, into ``out``."""


class PrunedNetwork(DenseNetwork):
    """A network that `dynaprune.attach` makes smaller while it trains."""

    pruner: Pruner

    def __init__(self, state: TrainState, data: TaskData) -> None:
        from dynaprune.pruning.attach import attach
        from dynaprune.pruning.decide.calibration import CalibrationTrial

        model, config, task = state.model, state.config, state.task
        super().__init__(model)

        def losses(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            inputs, targets = batch
            classes = targets if data.classes is not None else None
            return task.losses(task.forward(model, inputs), targets), classes

        trial = None
        if config.calibration_samples:
            trial = CalibrationTrial(
                model,
                data.train,
                losses,
                samples=config.calibration_samples,
                batch_size=task.evaluation_batch or _TRIAL_BATCH,
                seed=config.model_seed + 1,
                collate=data.collate,
            )
        self.trial = CountedTrial(trial)
        inputs, _ = next(batches(data.train, 2, collate=data.collate))
        steps = total_steps(config, len(data.train))  # type: ignore[arg-type]
        self.pruner = attach(
            model,
            state.optimizer,
            config.pruning_config(steps, data.classes),
            trial=None if trial is None else self.trial,
            example_inputs=to_device(inputs, state.device),
        )
        self._state, self._data = state, data
        self._record = MaskRecord(self.pruner.layers)
        self._recorded, self._changed_at = -1, -_STATISTICS_SETTLED
        self.recalibrations = 0
        self.recalibration_seconds = 0.0
        self.after_step(0)

    def version(self) -> int:
        """Grows whenever blocks are removed or grow back, or neurons are cut."""
        return self.pruner.structure_version

    def event_next(self) -> bool:
        """Whether the next step ends with a pruning event."""
        return not self.pruner.nothing_left() and self.pruner.policy.due(self.pruner.steps + 1)

    def after_step(self, step: int) -> None:
        """Record the densities where the structure has changed in this step, and now and then all masks."""
        self._step = step
        if self.version() == self._recorded:
            return
        if step > 0:
            self._changed_at = step
        self._recorded = self.version()
        self._record.add(step, self.sparsity(), self.pruner.density(), self.pruner.layers)

    def before_evaluation(self) -> None:
        """Recalibrate batch norms where the structure has changed too recently for their running statistics.

        The samples are training samples, augmented as in training, by a generator of their own."""
        if self._step - self._changed_at >= _STATISTICS_SETTLED:
            return
        from dynaprune.pruning.recalibration import recalibrate_batch_norm

        started = time.perf_counter()
        config, task = self._state.config, self._state.task
        source = training_batches(
            self._data, _RECALIBRATION_BATCH, torch.Generator().manual_seed(config.model_seed + self._step)
        )
        wanted = -(-(config.calibration_samples or _RECALIBRATION_SAMPLES) // _RECALIBRATION_BATCH)
        full = max(1, len(self._data.train) // _RECALIBRATION_BATCH)  # type: ignore[arg-type]
        done = recalibrate_batch_norm(
            self.model,
            (
                to_device(inputs, self._state.device)
                for inputs, _ in itertools.islice(source, min(wanted, full))
            ),
            task.forward,
        )
        self.recalibrations += done > 0
        self.recalibration_seconds += time.perf_counter() - started

    def target_reached(self) -> bool:
        """Whether the sparsity is the target; self-paced pruning has no target and is never there."""
        return self.pruner.target_reached

    def final_standing(self) -> int:
        """0 while the network is being pruned, 1 from the schedule's end on, 2 with the target reached."""
        return self.pruner.final_standing

    def sparsity(self) -> float:
        """Share of the weights of the prunable layers, as they were at the start, that is gone."""
        return self.pruner.sparsity

    def sparsity_of_model(self) -> float:
        """Share of all parameters, as they were at the start, that is gone."""
        return self.pruner.sparsity_of_model

    def parameters_active(self) -> int:
        """Live values: of block-sparse weights those of live blocks, of everything else all."""
        return self.pruner.live_parameters

    def trial_flops(self) -> float:
        """FLOPs of all forward passes that the trials made."""
        return self.trial.flops

    def probes(self) -> bool:
        """Whether the next step measures the dense gradient, which an event after it needs."""
        return self.pruner.probes_next()

    def facts(self) -> dict[str, Any]:
        """Size, sparsity and counts of removed units, now."""
        said = self.pruner.report()
        return {
            **super().facts(),
            "sparsity": self.sparsity(),
            "sparsity_of_model": self.sparsity_of_model(),
            "target_reached": self.target_reached(),
            **{name: said[name] for name in REMOVALS},
            **{name: said[name] for name in (NEVER_PRESENT,) if said[name]},
            **self._of_neurons(said),
            **self._rewired(said),
            "density_by_layer": self.pruner.density(),
        }

    def _of_neurons(self, said: Mapping[str, Any]) -> dict[str, Any]:
        if said["units"] == "blocks":
            return {}
        return {name: said[name] for name in OF_NEURONS if said[name] is not None}

    def _rewired(self, said: Mapping[str, Any]) -> dict[str, Any]:
        if not self.pruner.config.rewire:
            return {}
        audit = said["rewire_audit"]
        tested = {AUDITED: audit["blocks_tested"], AUDIT_FAILED: audit["blocks_failed"]}
        return {
            SWAPPED: said["blocks_swapped"],
            **(tested if audit["count"] else {}),
            EVER_LIVED: said["blocks_ever_lived"]["share"],
        }

    def end_of_training(self) -> dict[str, Any]:
        """What the trials cost, and the pruner's own report."""
        return {
            "trial_calls": self.trial.calls,
            "trial_seconds": self.trial.seconds,
            "recalibrations": self.recalibrations,
            "recalibration_seconds": self.recalibration_seconds,
            "structure_changes": self.version(),
            "pruner": self.pruner.report(),
        }

    def step_times(self, batches: Iterator[tuple[Any, torch.Tensor]] | None) -> dict[str, Any]:
        """The closing steps' median under another name, and the medians of `time_in_turn`."""
        if batches is None:
            return {"step_seconds_dense": None}
        alone = median_seconds(self._state.step_seconds)
        return {"step_seconds_last_alone": alone, **time_in_turn(self._state, self._data, batches)}

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, the masks so far, and the costs of trials and recalibrations."""
        return {
            "pruner": self.pruner.state_dict(),
            "record": self._record.state_dict(),
            "trial": self.trial.costs(),
            "steps": [self._step, self._recorded, self._changed_at],
            "recalibrations": [self.recalibrations, self.recalibration_seconds],
        }

    def leave_out(self, seconds: float) -> None:
        """Count ``seconds`` that have just passed as no time of the training."""
        self.pruner.ledger.leave_out(seconds)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved `state_dict`; ValueError for that of another model, score or trial."""
        self.pruner.load_state_dict(state["pruner"])
        self._record.load_state_dict(state["record"])
        self.trial.resume(state["trial"])
        self._step, self._recorded, self._changed_at = state["steps"]
        self.recalibrations, self.recalibration_seconds = state["recalibrations"]

    def write(self, out: Path, tested: nn.Module) -> None:
        """The record of the masks, and the tested model as ``model.safetensors`` for `dynaprune.load`."""
        from dynaprune.saving.checkpoint import save

        save(tested, out / "model.safetensors")
        self._record.write(out, self._step, self.sparsity(), self.pruner.layers)
