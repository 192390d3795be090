"""The settings of one run: task defaults, what the user changed, and the checks on both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynaprune.experiment.tasks import Split, Task, get_task
from dynaprune.experiment.tasks.data import on_hub

if TYPE_CHECKING:
    from dynaprune.pruning.config import PruningConfig

__all__ = ["RunConfig", "resolve"]

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, the same for both arms (``dropout`` is the baseline's).

    ``target_sparsity`` None means self-paced. ``pruning`` holds further keyword arguments of
    `dynaprune.PruningConfig`, ``options`` the settings that only this task has."""

    task: str
    seed: int = 0
    fold: int | None = None
    folds: int | None = None
    data: str | None = None
    device: str = "cpu"
    epochs: int = 50
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 0.0
    batch_size: int = 32
    weight_decay: float = 1e-4
    patience: int = 5
    dropout: float = 0.5
    threshold: float = 0.01
    block_size: int = 32
    target_sparsity: float | None = 0.9
    calibration_samples: int = 1024
    preset: str | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def split(self) -> Split:
        """Which rows are the test part."""
        return Split(self.seed, self.fold, self.folds, self.data)

    def pruning_config(self, total_steps: int, classes: int | None = None) -> PruningConfig:
        """The pruned arm's settings for a training of ``total_steps`` steps; ValueError or TypeError for
        wrong ones."""
        from dynaprune.pruning.config import PruningConfig

        return PruningConfig(
            target_sparsity=self.target_sparsity,
            block_size=self.block_size,
            threshold=self.threshold,
            total_steps=total_steps,
            batch_size=self.batch_size,
            classes=classes,
            seed=self.model_seed,
            **{"neurons": True, **self.pruning},
        )

    @property
    def model_seed(self) -> int:
        """Seed of the initial weights and of the batch order: another one in each fold."""
        return self.seed * 1009 + (self.fold or 0)

    def to_json(self) -> dict[str, Any]:
        """The fields, as they go into ``report.json``."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """The configuration written to ``path`` as JSON.

        ValueError, with the file's name, for one that is damaged."""
        from dynaprune.experiment.saved_results import read_json

        found = read_json(path)
        unknown = sorted(found.keys() - {f.name for f in fields(cls)})
        if unknown or "task" not in found:
            raise ValueError(f"{path}: expected the settings of a run, got unknown ones {unknown} or no task")
        try:
            return check(cls(**found))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None


# The experiment's literal settings, whatever a task's defaults are.
PAPER: dict[str, Any] = {
    "optimizer": "adam",
    "lr": 1e-3,
    "schedule": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "batch_size": 32,
    "epochs": 50,
    "patience": 5,
    "weight_decay": 1e-4,
    "dropout": 0.5,
    "threshold": 0.01,
}


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(
            "device cuda was asked for, and this torch finds no CUDA device (use --device cpu or auto)"
        )
    return "cuda" if available and name != "cpu" else "cpu"


def _positive(name: str, value: float, *, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be {'at least 0' if zero else 'above 0'}, got {value}")


def check(config: RunConfig) -> RunConfig:
    """The configuration itself; ValueError that names the setting, what was expected and what came."""
    for name in ("epochs", "batch_size", "patience", "block_size", "calibration_samples"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    _positive("lr", config.lr)
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        _positive(name, getattr(config, name), zero=True)
    for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {config.dropout}")
    if not 0 < config.threshold < 1:
        raise ValueError(f"threshold is a probability above 0 and below 1, got {config.threshold}")
    if config.target_sparsity is not None and not 0 < config.target_sparsity < 1:
        raise ValueError(f"target sparsity is a fraction above 0 and below 1, got {config.target_sparsity}")
    if config.seed < 0:
        raise ValueError(f"seed must be at least 0, got {config.seed}")
    if config.folds is not None and config.folds < 2:
        raise ValueError(f"folds must be at least 2, got {config.folds}")
    if (
        config.data is not None
        and not on_hub(config.data)
        and not Path(str(config.data)).expanduser().is_dir()
    ):
        raise ValueError(f"data must be 'hub', 'hub@COMMIT' or a folder, and {config.data} is not a folder")
    config.pruning_config(total_steps=1000)
    return config


def _options(task: Task, given: Mapping[str, Any]) -> dict[str, Any]:
    """The task's own settings, with what was given; ValueError for one that the task does not have, or of
    another type than its default's."""
    chosen = dict(task.options)
    for name, value in given.items():
        if name not in chosen:
            known = ", ".join(chosen) or "none"
            raise ValueError(f"{task.name} has no setting {name!r}; its own settings: {known}")
        default = chosen[name]
        wanted = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise ValueError(f"{name} must be like its default {default!r}, got {value!r}")
        chosen[name] = value
    return chosen


def resolve(
    task: str,
    *,
    preset: str | None = None,
    self_paced: bool = False,
    options: Mapping[str, Any] | None = None,
    **given: Any,
) -> RunConfig:
    """A checked configuration: the task's defaults, then those of a named preset ("paper": the experiment's
    literal settings), then what was given.

    ``given`` takes the fields of `RunConfig`, ``options`` the task's own settings; None means not given.
    ``self_paced`` drops the target sparsity."""
    known = get_task(task)
    names = {f.name for f in fields(RunConfig)} - {"options"}
    defaults = {k: v for k, v in asdict(known.defaults).items() if k in names}
    config = RunConfig(task=task, preset=preset, **defaults)
    chosen: dict[str, Any] = {}
    if preset is not None:
        presets = {"paper": PAPER, **known.presets}
        if preset not in presets:
            raise ValueError(f"{task} has the presets {', '.join(presets)}, got {preset!r}")
        settings = dict(presets[preset])
        chosen = dict(settings.pop("options", {}))
        config = replace(config, **settings)
    if self_paced:
        if given.get("target_sparsity") is not None:
            raise ValueError("--self-paced has no target: leave --target-sparsity out")
        config = replace(config, target_sparsity=None, pruning=dict(known.defaults.self_paced))
    chosen.update({k: v for k, v in (options or {}).items() if v is not None})
    config = replace(
        config, options=_options(known, chosen), **{k: v for k, v in given.items() if v is not None}
    )
    return check(replace(config, device=_device(given.get("device") or "auto")))
