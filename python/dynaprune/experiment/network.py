"""How large an arm's network is while it trains: the one place where the training loop meets the pruner."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dynaprune.experiment.metrics import flops_of
from dynaprune.experiment.report import REMOVALS, write_csv, write_json
from dynaprune.experiment.steps import to_device
from dynaprune.experiment.tasks.data import batches, batches_per_epoch, training_batches
from dynaprune.saving.durable import write_file

if TYPE_CHECKING:
    from dynaprune.experiment.steps import Arm
    from dynaprune.experiment.tasks import TaskData
    from dynaprune.nn import BlockSparseLayer

__all__ = ["CountedTrial", "DenseStructure", "PrunedStructure"]

FRAME_EVERY = 0.04
# After so many steps a batch norm's running statistics (momentum 0.1) hold less than 1% of what they were.
_STATISTICS_SETTLED = 50
_RECALIBRATION_BATCH = 128
_TRIAL_BATCH = 256


class DenseStructure:
    """A network that keeps its size: the baseline arm."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters_total = sum(p.numel() for p in model.parameters())

    def version(self) -> int:
        """Changes whenever the network's structure does."""
        return 0

    def after_step(self, step: int) -> None:
        """Called after every training step, with the number of steps done."""

    def before_evaluation(self) -> None:
        """Called before the network is evaluated."""

    def target_reached(self) -> bool:
        """Whether the network is as small as it was to become."""
        return True

    def schedule_ended(self) -> bool:
        """Whether the pruning schedule is over."""
        return True

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

    def facts(self) -> dict[str, Any]:
        """What the report says of the network as it is now."""
        return {"parameters_total": self.parameters_total, "parameters_active": self.parameters_active()}

    def end_of_training(self) -> dict[str, Any]:
        """What the report says of the whole training."""
        return {}

    def write(self, out: Path, tested: nn.Module) -> None:
        """Write what the pictures need, and the model that was tested, into ``out``."""


class CountedTrial:
    """A trial that counts its calls, FLOPs and seconds; everything else is the wrapped trial's."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial
        self.calls = 0
        self.flops = 0.0
        self.seconds = 0.0

    def __call__(self) -> Any:
        started = time.perf_counter()
        losses, flops = flops_of(self._trial)
        self.calls += 1
        self.flops += flops
        self.seconds += time.perf_counter() - started
        return losses

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_trial"], name)


@dataclass
class _Frame:
    """The live blocks of every layer after ``step`` steps: root mean square weight per block, 0 where
    dead."""

    step: int
    sparsity: float
    layers: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, int]]


class PrunedStructure(DenseStructure):
    """A network that `dynaprune.attach` makes smaller while it trains."""

    def __init__(self, arm: Arm, data: TaskData) -> None:
        import dynaprune

        model, config, task = arm.model, arm.config, arm.task
        super().__init__(model)

        def losses(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            inputs, targets = batch
            classes = targets if data.classes is not None else None
            return task.losses(task.forward(model, inputs), targets), classes

        self.trial = CountedTrial(
            dynaprune.CalibrationTrial(
                model,
                data.train,
                losses,
                samples=config.calibration_samples,
                batch_size=task.evaluation_batch or _TRIAL_BATCH,
                seed=config.model_seed + 1,
                collate=data.collate,
            )
        )
        inputs, _ = next(batches(data.train, 2, collate=data.collate))
        total_steps = config.epochs * batches_per_epoch(data.train, config.batch_size)
        pruning = config.pruning_config(total_steps, data.classes)
        self.pruner = dynaprune.attach(
            model, arm.optimizer, pruning, trial=self.trial, example_inputs=to_device(inputs, arm.device)
        )
        self._arm, self._data = arm, data
        self._shapes = {name: _matrix_shape(layer) for name, layer in self.pruner.layers.items()}
        self._densities: list[dict[str, Any]] = []
        self._frames: list[_Frame] = []
        self._recorded, self._changed_at = -1, -_STATISTICS_SETTLED
        self.recalibrations = 0
        self.recalibration_seconds = 0.0
        self.after_step(0)

    def version(self) -> int:
        """Grows whenever blocks are removed or grow back, or neurons are cut."""
        return self.pruner.structure_version

    def after_step(self, step: int) -> None:
        """Record the densities where the structure has changed in this step, and now and then all masks."""
        self._step = step
        if self.version() == self._recorded:
            return
        if step > 0:
            self._changed_at = step
        self._recorded = self.version()
        sparsity = self.sparsity()
        self._densities.append({"step": step, "sparsity": sparsity, **self.pruner.density()})
        if not self._frames or sparsity - self._frames[-1].sparsity >= FRAME_EVERY:
            self._frames.append(self._frame())

    def before_evaluation(self) -> None:
        """Recalibrate batch norms where the structure has changed too recently for their running statistics.

        The samples are training samples, augmented as in training, by a generator of their own."""
        if self._step - self._changed_at >= _STATISTICS_SETTLED:
            return
        from dynaprune.pruning.recalibration import recalibrate_batch_norm

        started = time.perf_counter()
        config, task = self._arm.config, self._arm.task
        source = training_batches(
            self._data, _RECALIBRATION_BATCH, torch.Generator().manual_seed(config.model_seed + self._step)
        )
        wanted = -(-config.calibration_samples // _RECALIBRATION_BATCH)
        full = max(1, len(self._data.train) // _RECALIBRATION_BATCH)  # type: ignore[arg-type]
        done = recalibrate_batch_norm(
            self.model,
            (
                to_device(inputs, self._arm.device)
                for inputs, _ in itertools.islice(source, min(wanted, full))
            ),
            task.forward,
        )
        self.recalibrations += done > 0
        self.recalibration_seconds += time.perf_counter() - started

    def _frame(self) -> _Frame:
        layers = self.pruner.layers
        return _Frame(
            self._step,
            self.sparsity(),
            {name: _block_rms(layer) for name, layer in layers.items()},
            {name: _matrix_shape(layer) for name, layer in layers.items()},
        )

    def target_reached(self) -> bool:
        """Whether the sparsity is the target; self-paced pruning has no target and is never there."""
        return self.pruner.target_reached

    def schedule_ended(self) -> bool:
        """Whether the target is reached or the schedule's end has passed."""
        return self.pruner.structure_final

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

    def facts(self) -> dict[str, Any]:
        """Size, sparsity and counts of removed units, now."""
        said = self.pruner.report()
        return {
            **super().facts(),
            "sparsity": self.sparsity(),
            "sparsity_of_model": self.sparsity_of_model(),
            "target_reached": self.target_reached(),
            **{name: said[name] for name in REMOVALS},
            "density_by_layer": self.pruner.density(),
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

    def write(self, out: Path, tested: nn.Module) -> None:
        """``density.csv`` (layer by step), ``masks.json`` and ``masks.npz`` (frames of live blocks), and the
        tested model as ``model.safetensors`` for `dynaprune.load`."""
        from dynaprune.saving.checkpoint import save

        save(tested, out / "model.safetensors")
        if self._frames[-1].step != self._step:
            self._frames.append(self._frame())
        write_csv(out / "density.csv", self._densities)
        arrays: dict[str, np.ndarray] = {}
        index = []
        for number, frame in enumerate(self._frames):
            layers: dict[str, Any] = {}
            for name, image in frame.layers.items():
                key = f"frame{number}_layer{len(layers)}"
                arrays[key] = image
                layers[name] = {"key": key, "shape": list(frame.shapes[name])}
            index.append({"step": frame.step, "sparsity": frame.sparsity, "layers": layers})
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        write_json(out / "masks.json", {"shapes": shapes, "frames": index})
        write_file(out / "masks.npz", lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def _matrix_shape(layer: BlockSparseLayer) -> tuple[int, int]:
    """Outputs and inputs (for a convolution channels x taps) of the dense weight the layer stands for."""
    layout = layer.layout
    if layout.conv is None:
        return layout.out_features, layout.in_features
    taps = layout.conv.taps
    return layout.out_features, layout.in_features // layout.conv.groups * taps


def _block_rms(layer: BlockSparseLayer) -> np.ndarray:
    """Root mean square of each live block's weights ``[rows, columns]`` float16, 0 where no block lives."""
    layout = layer.layout
    slots = layout.slot_of_block.long()
    rms = layer.values.detach().float().pow(2).mean(dim=(1, 2)).sqrt().clamp(min=1e-6)
    image = torch.where(layout.mask & (slots >= 0), rms[slots.clamp(min=0)], torch.zeros(()).to(rms))
    return image.cpu().numpy().astype(np.float16)
