"""Pruning in ``transformers.Trainer``: one more callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynaprune.integrations.losses import per_sample_losses
from dynaprune.integrations.session import Session, check_model
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.calibration import CalibrationTrial
from dynaprune.pruning.decide.trial import Losses, Trial
from dynaprune.pruning.early_stopping import EarlyStopping
from dynaprune.pruning.prepare import checked, prepare
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.pruner import Pruner
from dynaprune.saving.carried import carry_structure
from dynaprune.saving.pretrained import describe_structure

# A forward pass without gradients takes a fraction of a training step's memory.
_FORWARD_BATCHES = 4


class DynaPruneCallback(TrainerCallback):
    """Makes the Trainer's model smaller while it trains; the script needs this one argument more::

        from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
        from dynaprune import DynaPruneCallback, PruningConfig

        model = AutoModelForSequenceClassification.from_pretrained(model_name)
        pruning = DynaPruneCallback(model, PruningConfig(target_sparsity=0.7, block_size=32))
        arguments = TrainingArguments(output_dir, num_train_epochs=3)
        trainer = Trainer(model, arguments, train_dataset=train_dataset, callbacks=[pruning])
        trainer.train()
        trainer.save_model()
        smaller = AutoModelForSequenceClassification.from_pretrained(output_dir)

    Layers become block-sparse when the callback is made, since the Trainer reads checkpoints and builds its
    optimizer before a training begins; the pruner is attached when it begins, with ``state.max_steps`` as
    ``total_steps`` and the Trainer's batch as ``batch_size`` where the configuration leaves them open. It is
    detached when training ends; ``pruning.pruner.finalize()`` then gives plain layers.

    Checkpoints. ``config.json`` holds the structure's manifest, so ``from_pretrained`` gives the pruned model
    wherever this module is imported (``import dynaprune.integrations.transformers``); without it transformers
    warns of an unknown quantization type and stops at weights of a wrong size. During a training
    ``model.safetensors`` also holds the pruner's state, so ``trainer.train(resume_from_checkpoint=...)`` goes
    on bit for bit (with a callback made in the same way), and ``load_best_model_at_end`` may go back to an
    earlier structure.

    The best model and early stopping. While the target sparsity is not reached and the schedule's end has
    not passed, no checkpoint counts as the best; one with the target beats all from before. The Trainer's
    ``EarlyStoppingCallback`` therefore waits too. ``patience`` here is the same rule with one thing more:
    it also starts anew at a structural change.

    Logs get ``density``, ``sparsity``, ``sparsity_of_model``, ``live_parameters`` and ``flops_saving``, in
    ``state.log_history`` and for callbacks after this one. Reporters named by ``report_to`` come before it
    and do not see them.

    Args:
        model: the Trainer's, on any device; no ``model_init``. Or what ``dynaprune.prepare`` made of it, with
            its configuration.
        config: default ``PruningConfig()``; ``total_steps`` may be left open.
        trial: True: per-sample losses on ``calibration``. False: removals are untested. Or a trial of your
            own, as for ``dynaprune.attach``.
        calibration: map-style data set, with the columns of the training set, for the trial; None: the
            training set itself.
        loss: ``loss(model, batch)`` returns one loss per sample ``[b]``, or (losses, classes ``[b]``). None:
            from the model's logits and labels, where it is a classifier of samples or of tokens.
        samples: of ``calibration``, per pruning event.
        patience: stop after so many evaluations without a better ``metric_for_best_model`` (default the
            evaluation loss); None: never.
        example_inputs: as for ``dynaprune.attach``.

    Raises:
        TypeError, ValueError: a model that cannot be pruned, by name and with the reason; a wrong argument.
    """

    def __init__(
        self,
        model: nn.Module | Prepared,
        config: PruningConfig | None = None,
        *,
        trial: Trial | Callable[[], Losses] | bool = True,
        calibration: Any = None,
        loss: Callable[[nn.Module, Any], Losses] | None = None,
        samples: int = 1024,
        patience: int | None = None,
        example_inputs: Any = None,
    ) -> None:
        if not isinstance(trial, bool) and not callable(trial):
            raise TypeError(
                "expected the trial as True, False or a callable that returns per-sample losses, got "
                f"{trial!r}"
            )
        if trial is not True and (calibration is not None or loss is not None):
            raise ValueError("expected calibration and loss with trial=True only: nothing else reads them")
        prepared = model if isinstance(model, Prepared) else None
        if prepared is not None and (config is not None or example_inputs is not None):
            raise ValueError("expected config and example_inputs in prepare, got them in the callback")
        self.config = checked(config) if prepared is None else prepared.config
        self._trial, self._calibration, self._loss = trial, calibration, loss
        self._samples = samples
        self._early_stopping = None if patience is None else EarlyStopping(patience)
        self._patience = patience
        self._training = False
        self._resumed: dict[str, Any] | None = None
        self._version = 0
        inner = model.model if isinstance(model, Prepared) else model
        plain = describe_structure(inner) if isinstance(inner, PreTrainedModel) else None
        if prepared is None:
            prepared = prepare(inner, self.config, example_inputs=example_inputs)
        self._session = Session(prepared)
        carry_structure(self.model, state=self._carried, loaded=self._loaded, plain=plain)

    @property
    def model(self) -> nn.Module:
        """The Trainer's model."""
        return self._session.prepared.model

    @property
    def pruner(self) -> Pruner | None:
        """The pruner of this training, or of the last one; None before."""
        return self._session.pruner

    def _carried(self) -> dict[str, Any] | None:
        if not self._training or self.pruner is None:
            return None
        stopping = None if self._early_stopping is None else asdict(self._early_stopping)
        return {
            **self._session.state_dict(),
            "early_stopping": stopping,
            "structure_seen": self._version,
        }

    def _loaded(self, state: dict[str, Any] | None) -> None:
        self._resumed = state

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a Trainer with another model."""
        check_model(self.model, kwargs.get("model"), "Trainer")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the pruner to the Trainer's optimizer, and go on where a checkpoint left off."""
        check_model(self.model, kwargs.get("model"), "Trainer")
        if args.n_gpu > 1:
            raise ValueError(
                f"cannot prune on {args.n_gpu} GPUs in one process: the replicas of DataParallel would be "
                "cut from masks of another device; make one device visible"
            )
        trial = self._make_trial(args, kwargs.get("train_dataloader")) if self._trial is True else self._trial
        batch_size = args.train_batch_size * args.gradient_accumulation_steps
        pruner = self._session.begin(
            kwargs["optimizer"], trial or None, total_steps=state.max_steps, batch_size=batch_size
        )
        self._training, self._version = True, pruner.structure_version
        if self._early_stopping is not None and self._patience is not None:
            self._early_stopping = EarlyStopping(self._patience)
        if state.global_step > 0:
            self._resume()
        self._resumed = None
        self._forget_ineligible_best(state)

    def _resume(self) -> None:
        saved = self._resumed
        self._session.resume(saved)
        assert saved is not None
        if self._early_stopping is not None and saved["early_stopping"] is not None:
            waited = {**saved["early_stopping"], "patience": self._early_stopping.patience}
            self._early_stopping = EarlyStopping(**waited)
        self._version = saved["structure_seen"]

    def _make_trial(self, args: TrainingArguments, loader: Any) -> CalibrationTrial:
        training: Any = getattr(loader, "dataset", None)
        dataset = self._calibration
        if dataset is None:
            dataset = training
        elif hasattr(dataset, "column_names") and hasattr(training, "column_names"):
            foreign = [name for name in dataset.column_names if name not in training.column_names]
            dataset = dataset.remove_columns(foreign)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                "expected a map-style data set (length, items by index) to test removals on, got "
                f"{type(dataset).__name__}: give calibration=, a trial of your own, or trial=False"
            )
        return CalibrationTrial(
            self.model,
            dataset,
            self._loss or per_sample_losses,
            samples=self._samples,
            batch_size=max(args.eval_batch_size, _FORWARD_BATCHES * args.train_batch_size),
            seed=self.config.seed,
            collate=loader.collate_fn,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Forget a best checkpoint that is not eligible, or that the new structure outranks."""
        self._forget_ineligible_best(state)

    on_step_begin = on_save = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the pruner's figures."""
        self._forget_ineligible_best(state)
        if not self._training or self.pruner is None:
            return
        found = self.pruner.figures()
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def _forget_ineligible_best(self, state: TrainerState) -> None:
        if self._training and self._session.outranks():
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Stop the training where ``patience`` has run out."""
        stopping, pruner = self._early_stopping, self.pruner
        if not self._training or stopping is None or pruner is None:
            return
        name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if metrics is None or name not in metrics:
            warnings.warn(
                f"early stopping finds no {name} among {sorted(metrics or ())} and waits",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        stopping.update(
            state.global_step,
            -metrics[name] if args.greater_is_better else metrics[name],
            standing=pruner.final_standing,
            structure_changed=pruner.structure_version != self._version,
        )
        self._version = pruner.structure_version
        if stopping.should_stop:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Detach the pruner; the model keeps its block-sparse layers."""
        if self.pruner is not None:
            self.pruner.detach()
            self.pruner.measure()
        self._training, self._resumed = False, None
