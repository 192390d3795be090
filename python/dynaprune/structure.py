"""How large an arm's network is while it trains: the one place where the training loop meets the pruner."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dynaprune.metrics import flops_of
from dynaprune.report import write_bytes, write_csv, write_json
from dynaprune.steps import to_device
from dynaprune.tasks.data import batches, batches_per_epoch

if TYPE_CHECKING:
    from dynaprune.nn import BlockSparseLayer
    from dynaprune.steps import Arm
    from dynaprune.tasks import TaskData

__all__ = ["CountedTrial", "DenseStructure", "PrunedStructure"]

FRAME_EVERY = 0.04


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

    def target_reached(self) -> bool:
        """Whether the network is as small as it was to become."""
        return True

    def schedule_ended(self, step: int) -> bool:
        """Whether the pruning schedule is over at ``step``."""
        return True

    def sparsity(self) -> float:
        """Share of the prunable weights that are gone."""
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

    def write(self, out: Path) -> None:
        """Write what the pictures need into ``out``."""


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


@dataclass
class _Film:
    """Density of every layer at each change of the structure, and now and then a frame of all masks."""

    densities: list[dict[str, Any]] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)


class PrunedStructure(DenseStructure):
    """A network that `dynaprune.attach` makes smaller while it trains."""

    def __init__(self, arm: Arm, data: TaskData) -> None:
        import dynaprune
        from dynaprune.nn import BlockSparseLayer

        model, config, task = arm.model, arm.config, arm.task
        super().__init__(model)
        self.total_steps = config.epochs * batches_per_epoch(data.train, config.batch_size)

        def losses(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = batch
            return task.losses(task.forward(model, inputs), targets), targets

        self.trial = CountedTrial(
            dynaprune.CalibrationTrial(
                model, data.train, losses, samples=config.calibration_samples, seed=config.model_seed + 1
            )
        )
        inputs, _ = next(batches(data.train, 2))
        self.pruning = dynaprune.PruningConfig(
            target_sparsity=config.target_sparsity,
            block_size=config.block_size,
            threshold=config.threshold,
            total_steps=self.total_steps,
            batch_size=config.batch_size,
            classes=data.classes,
            seed=config.model_seed,
            **{"neurons": True, **config.pruning},
        )
        self.pruner = dynaprune.attach(
            model, arm.optimizer, self.pruning, trial=self.trial, example_inputs=to_device(inputs, arm.device)
        )
        self._sparse_type = BlockSparseLayer
        self._built = {name: math.prod(_dense_shape(layer)) for name, layer in self._layers()}
        self._dense_shapes = {name: _dense_shape(layer) for name, layer in self._layers()}
        self._marks: tuple[Any, ...] = ()
        self._signature: tuple[Any, ...] = ()
        self._version = 0
        self._live: dict[str, int] = {}
        self._film = _Film()
        self._steps = 0
        self.version()

    def _layers(self) -> list[tuple[str, BlockSparseLayer]]:
        return [(n, m) for n, m in self.model.named_modules() if isinstance(m, self._sparse_type)]

    def version(self) -> int:
        """Changes with the live masks and the sizes of layers; cheap where no mask was touched since the last
        call."""
        layers = self._layers()
        masks = tuple((id(m), id(m.layout.mask), m.layout.mask._version) for _, m in layers)
        marks = (masks, tuple(p.shape for p in self.model.parameters()))
        if marks == self._marks:
            return self._version
        self._marks = marks
        signature = tuple(
            (name, _dense_shape(layer), layer.layout.mask.cpu().numpy().tobytes()) for name, layer in layers
        )
        if signature != self._signature:
            self._signature = signature
            self._version += 1
            self._live = {name: layer.live_values() for name, layer in layers}
            self._record()
        return self._version

    def _record(self) -> None:
        row: dict[str, Any] = {"step": self._steps, "sparsity": self.sparsity()}
        row.update({name: self._live.get(name, 0) / built for name, built in self._built.items()})
        self._film.densities.append(row)
        frames = self._film.frames
        if not frames or row["sparsity"] - frames[-1].sparsity >= FRAME_EVERY:
            frames.append(self._frame())

    def _frame(self) -> _Frame:
        layers = dict(self._layers())
        return _Frame(
            self._steps,
            self.sparsity(),
            {name: _block_rms(layer) for name, layer in layers.items()},
            {name: _dense_shape(layer) for name, layer in layers.items()},
        )

    def after_step(self, step: int) -> None:
        """Note the step, so that what changed in it is dated right."""
        self._steps = step
        self.version()

    def target_reached(self) -> bool:
        """True from the moment the pruner says so; self-paced pruning has no target and is never there."""
        return bool(self.pruner.target_reached)

    def schedule_ended(self, step: int) -> bool:
        """True after the schedule's ``end``, a fraction of all steps."""
        return step >= self.pruning.end * self.total_steps

    def sparsity(self) -> float:
        """Share of the weights of the layers that were swapped that is gone, cut neurons included."""
        return 1 - sum(self._live.values()) / sum(self._built.values())

    def parameters_active(self) -> int:
        """Live values: of block-sparse weights those of live blocks, of everything else all."""
        self.version()
        values = {id(layer.values) for _, layer in self._layers()}
        rest = sum(p.numel() for p in self.model.parameters() if id(p) not in values)
        return rest + sum(self._live.values())

    def trial_flops(self) -> float:
        """FLOPs of all forward passes that the trials made."""
        return self.trial.flops

    def facts(self) -> dict[str, Any]:
        """Size, sparsity and counts of removed units, now."""
        said = self.pruner.report()
        names = ("neurons_removed", "blocks_removed", "removed_passed", "removed_forced", "removed_untested")
        return {
            **super().facts(),
            "sparsity": self.sparsity(),
            "target_reached": self.target_reached(),
            **{name: said[name] for name in names},
            "density_by_layer": {
                name: self._live.get(name, 0) / built for name, built in self._built.items()
            },
        }

    def end_of_training(self) -> dict[str, Any]:
        """What the trials cost, and the pruner's own report."""
        return {
            "trial_calls": self.trial.calls,
            "trial_seconds": self.trial.seconds,
            "structure_changes": self._version - 1,
            "pruner": self.pruner.report(),
        }

    def write(self, out: Path) -> None:
        """``density.csv`` (layer by step), ``masks.json`` and ``masks.npz`` (frames of live blocks)."""
        frames = self._film.frames
        if frames and (frames[-1].step != self._steps):
            frames.append(self._frame())
        write_csv(out / "density.csv", self._film.densities)
        arrays: dict[str, np.ndarray] = {}
        index = []
        for number, frame in enumerate(frames):
            layers: dict[str, Any] = {}
            for name, image in frame.layers.items():
                key = f"frame{number}_layer{len(layers)}"
                arrays[key] = image
                layers[name] = {"key": key, "shape": list(frame.shapes[name])}
            index.append({"step": frame.step, "sparsity": frame.sparsity, "layers": layers})
        shapes = {name: list(shape) for name, shape in self._dense_shapes.items()}
        write_json(out / "masks.json", {"shapes": shapes, "frames": index})
        write_bytes(out / "masks.npz", lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def _dense_shape(layer: BlockSparseLayer) -> tuple[int, int]:
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
