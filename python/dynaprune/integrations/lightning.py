"""Pruning in ``lightning.Trainer``: one more callback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from dynaprune.integrations.session import NO_STATE, Session, check_model
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.calibration import CalibrationTrial
from dynaprune.pruning.decide.trial import Losses, Trial
from dynaprune.pruning.edit.followers import swapped_copies
from dynaprune.pruning.prepare import checked, prepare
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.pruner import Pruner
from dynaprune.saving.carried import carry_structure
from dynaprune.saving.checksum import checksum_of, verify
from dynaprune.saving.reshape import add_structure_hooks

_AVERAGE = "_average_model"


class DynaPruneLightningCallback(Callback):
    """Makes the module smaller while Lightning trains it; the script needs this one argument more::

        import torch
        from lightning import Trainer
        from dynaprune import DynaPruneLightningCallback, PruningConfig

        def losses(module, batch):
            x, y = batch
            return torch.nn.functional.cross_entropy(module(x), y, reduction="none"), y

        pruning = DynaPruneLightningCallback(PruningConfig(target_sparsity=0.7, block_size=8), loss=losses)
        trainer = Trainer(max_epochs=3, default_root_dir=output_dir, callbacks=[pruning])
        trainer.fit(module, train_loader)
        smaller = pruning.pruner.finalize()

    Layers become block-sparse in ``setup``, before Lightning reads a checkpoint; the pruner is attached when
    training starts, with ``estimated_stepping_batches`` as ``total_steps`` where the configuration leaves
    them open, and detached when it ends. Lightning steps with a closure, and the pruner observes after it.

    Checkpoints carry the structure and the pruner's state: ``trainer.fit(module, ckpt_path=...)`` goes on,
    with a callback made in the same way. ``trainer.test(module, ckpt_path=...)`` needs the callback too: it
    gives the module the checkpoint's structure. ``LightningModule.load_from_checkpoint`` knows no structure.

    While the target sparsity is not reached and the schedule's end has not passed, the callbacks
    ``EarlyStopping`` and ``ModelCheckpoint(monitor=...)`` of the trainer count nothing as the best: any later
    score beats what they have seen. The same happens once more when the target is reached after the end.

    Logs get ``density``, ``sparsity``, ``sparsity_of_model``, ``live_parameters`` and ``flops_saving``.

    Args:
        config: default ``PruningConfig()``; ``total_steps`` may be left open. Or what ``dynaprune.prepare``
            made of the module.
        loss: ``loss(module, batch)`` returns one loss per sample ``[b]``, or (losses, classes ``[b]``): makes
            the trial. Without it and without ``trial`` removals are untested, and the report says so.
        calibration: map-style data set for the trial; None: that of the training loader.
        samples: of ``calibration``, per pruning event.
        trial: a trial of your own, as for ``dynaprune.attach``.
        example_inputs: as for ``dynaprune.attach``.

    Raises:
        TypeError, ValueError: a wrong argument; in ``fit``, a module that cannot be pruned, with the reason.
    """

    def __init__(
        self,
        config: PruningConfig | Prepared | None = None,
        *,
        loss: Callable[[nn.Module, Any], Losses] | None = None,
        calibration: Any = None,
        samples: int = 1024,
        trial: Trial | Callable[[], Losses] | None = None,
        example_inputs: Any = None,
    ) -> None:
        if trial is not None and loss is not None:
            raise ValueError("expected a loss or a trial, got both: the loss makes a trial")
        if calibration is not None and loss is None:
            raise ValueError("expected a loss beside calibration, got None: nothing else reads it")
        if isinstance(config, Prepared) and example_inputs is not None:
            raise ValueError("expected example_inputs in prepare, got them in the callback")
        self.config = config.config if isinstance(config, Prepared) else checked(config)
        self._loss, self._calibration, self._samples = loss, calibration, samples
        self._trial, self._example = trial, example_inputs
        self._prepared = isinstance(config, Prepared)
        self._session = Session(config) if isinstance(config, Prepared) else None
        self._saved: dict[str, Any] | None = None

    @property
    def pruner(self) -> Pruner | None:
        """The pruner of this training, or of the last one; None before."""
        return None if self._session is None else self._session.pruner

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swap the layers (to fit), and let the module take the structure of what it loads."""
        add_structure_hooks(pl_module)
        if any(hasattr(callback, _AVERAGE) for callback in getattr(trainer, "callbacks", ())):
            carry_structure(pl_module)  # callbacks that average drop the metadata of state dicts
        if self._prepared and self._session is not None:
            check_model(self._session.prepared.given, pl_module, "Trainer")
        if stage == "fit" and (self._session is None or self._session.prepared.given is not pl_module):
            sparse = any(isinstance(module, BlockSparseLayer) for module in pl_module.modules())
            self._session = Session(prepare(pl_module, self.config, example_inputs=self._example))
            if not sparse:
                _swap_averages(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the pruner to the module's optimizers, and go on where a checkpoint left off."""
        assert self._session is not None, "Lightning calls setup first"
        trial = self._trial if self._loss is None else self._make_trial(trainer, pl_module, self._loss)
        pruner = self._session.begin(
            trainer.optimizers,
            trial,
            total_steps=self.config.total_steps or _total_steps(trainer),
            batch_size=_batch_size(trainer),
        )
        for average in _averages(trainer):
            pruner.follow(average)
        if self._saved is not None:
            self._session.resume(self._saved)
            self._saved = None
        elif trainer.global_step > 0 and trainer.ckpt_path is not None:
            raise ValueError(NO_STATE)

    def _make_trial(
        self, trainer: Trainer, module: LightningModule, loss: Callable[[nn.Module, Any], Losses]
    ) -> CalibrationTrial:
        loader, precision = trainer.train_dataloader, trainer.precision_plugin

        def move(batch: Any) -> Any:
            """The way of a training batch in Lightning's fit loop."""
            batch = module.on_before_batch_transfer(precision.convert_input(batch), 0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        dataset = self._calibration if self._calibration is not None else getattr(loader, "dataset", None)
        return CalibrationTrial(
            module,
            dataset,
            loss,
            samples=self._samples,
            batch_size=max(_batch_size(trainer) or 1, 64),
            seed=self.config.seed,
            collate=getattr(loader, "collate_fn", None),
            move=move,
            context=precision.forward_context,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Log the pruner's figures, and let early stopping and best checkpoints wait."""
        if self._session is None or self._session.pruner is None:
            return
        pl_module.log_dict(self._session.pruner.figures(), on_step=True, on_epoch=False, batch_size=1)
        if self._session.outranks():
            for callback in getattr(trainer, "callbacks", ()):
                _forget_best(callback)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the pruner; the module keeps its block-sparse layers."""
        if self.pruner is not None:
            self.pruner.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the module's and the optimizers' states."""
        if self._session is None or self._session.pruner is None:
            return {}
        state = self._session.state_dict()
        return {**state, "checksum": checksum_of(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until training starts; ValueError for one that is damaged."""
        state = {key: value for key, value in state_dict.items() if key != "checksum"}
        verify(state, state_dict.get("checksum"), "the pruner's state in the checkpoint")
        self._saved = state or None


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averages of weights (EMA, SWA) that the trainer's callbacks keep."""
    found = [getattr(callback, _AVERAGE, None) for callback in getattr(trainer, "callbacks", ())]
    return [average for average in found if isinstance(average, nn.Module)]


def _swap_averages(trainer: Trainer, module: nn.Module) -> None:
    """Swap the layers of averages that were made of the module before its layers were swapped."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BlockSparseLayer)}
    for average in _averages(trainer):
        if not any(isinstance(part, BlockSparseLayer) for part in average.modules()):
            for copy in swapped_copies(average, module, layers):
                add_structure_hooks(copy)
                carry_structure(copy)


def _total_steps(trainer: Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        raise ValueError(
            f"expected a training of known length (max_steps or max_epochs), got {steps} steps: give "
            "total_steps in the PruningConfig"
        )
    return int(steps)


def _batch_size(trainer: Trainer) -> int | None:
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size * trainer.accumulate_grad_batches if isinstance(size, int) else None


def _forget_best(callback: Any) -> None:
    """Let any score beat the best one that the callback has seen."""
    if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or callback.monitor is None:
        return
    worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
    if isinstance(callback, EarlyStopping):
        callback.best_score, callback.wait_count = worst, 0
        return
    callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
    callback.kth_value = worst
    callback.best_model_score, callback.best_model_path = None, ""
