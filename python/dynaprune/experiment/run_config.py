"""The settings of one run: each with its type, its default and its help, and the checks on them.

The command line is made of what stands here, and is not to wait for torch: this module does not import it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict, get_args, get_type_hints

from dynaprune.experiment.tasks import Split, Task, get_task

if TYPE_CHECKING:
    from dynaprune.pruning.config import PruningConfig

__all__ = [
    "Resuming",
    "RunConfig",
    "Setting",
    "TaskOptions",
    "differing_settings",
    "resolve",
    "settings",
]

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
PILOT_LENGTH = 1 / 3


class Option(NamedTuple):
    """What the command line says of a setting.

    ``literal``: the preset "paper" sets it to the default that stands beside it. ``flag``: name and help of
    an option without a value that stands for one value of this setting."""

    help: str
    literal: bool = False
    flag: tuple[str, str] | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, the same for both arms (``dropout`` is the baseline's).

    The defaults are the experiment's; a task that needs others names them in its module. ``optimizer`` is
    "adam" (L2 in the gradient) or "adamw". The learning rate rises over ``warmup_steps``, then follows
    ``schedule``: "constant", "linear" (to zero) or "cosine" (to zero). Gradients are clipped to the norm
    ``max_grad_norm`` where it is above 0. ``target_sparsity`` None means self-paced. A ``pilot`` has a third
    of the steps, and is for choosing the learning rate. ``pruning`` holds further keyword arguments of
    `dynaprune.PruningConfig`, ``options`` the task's `TaskOptions`."""

    task: str
    epochs: Annotated[int, Option("at most this many epochs", literal=True)] = 50
    seed: Annotated[int, Option("seed of split, weights and batches [default: 0]")] = 0
    fold: int | None = None
    folds: int | None = None
    target_sparsity: Annotated[
        float | None,
        Option(
            "share of weights to remove, 0..1",
            flag=("self_paced", "no target: the trial alone decides how far"),
        ),
    ] = 0.9
    data: Annotated[
        str | None, Option("'hub', 'hub@COMMIT' or a folder [default: DYNAPRUNE_DATA, else the hub]")
    ] = None
    device: Annotated[str, Option("auto, cpu or cuda [default: auto]")] = "cpu"
    preset: Annotated[
        str | None,
        Option(
            "'paper', the experiment's literal settings, or a task's own",
            flag=("paper", "the same as --preset paper"),
        ),
    ] = None
    units: Annotated[
        str, Option("what goes: blocks, neurons (of plain layers, which get narrower) or both")
    ] = "blocks"
    target_of: Annotated[
        str | None, Option("of what the target is a share: weights, or flops with --units neurons")
    ] = None
    block_size: Annotated[int, Option("edge of a block")] = 32
    threshold: Annotated[
        float, Option("the trial's probability of accepting a harmful removal", literal=True)
    ] = 0.01
    optimizer: Annotated[str, Option("adam (L2 in the gradient) or adamw", literal=True)] = "adam"
    lr: Annotated[float, Option("learning rate", literal=True)] = 1e-3
    schedule: Annotated[str, Option("of the learning rate: constant, linear or cosine", literal=True)] = (
        "constant"
    )
    warmup_steps: Annotated[int, Option("steps over which the learning rate rises", literal=True)] = 0
    max_grad_norm: Annotated[float, Option("clip gradients to this norm; 0: do not", literal=True)] = 0.0
    batch_size: Annotated[int, Option("samples per step", literal=True)] = 32
    patience: Annotated[
        int, Option("epochs without a better validation loss before stopping", literal=True)
    ] = 5
    weight_decay: Annotated[float, Option("L2, or AdamW's decay", literal=True)] = 1e-4
    dropout: Annotated[float, Option("the baseline's dropout", literal=True)] = 0.5
    calibration_samples: Annotated[int, Option("training samples per trial evaluation; 0: no trial")] = 1024
    trial_budget: Annotated[
        float | None, Option("share of the training's FLOPs that trials may cost [default: 0.05]")
    ] = None
    initial_sparsity: Annotated[
        float | None, Option("share of weights that the pruned arm leaves out from the first step, 0..1")
    ] = None
    sparse_rate: Annotated[
        str | None, Option("multiplier of the learning rate of blocks that begin sparse: auto or a number")
    ] = None
    rewire: Annotated[
        float | None, Option("share of the live blocks that change places per event at first, 0..1")
    ] = None
    rewire_growth: Annotated[
        str | None, Option("where blocks begin: gradient (over the inputs' energy) or random")
    ] = None
    rewire_score: Annotated[
        str | None, Option("which blocks go for them: magnitude or random [default: by the score]")
    ] = None
    rewire_until: Annotated[
        float | None, Option("fraction of training at which that stops; removals come after it")
    ] = None
    rewire_audit: Annotated[
        int | None, Option("so many of these events test what goes, which goes all the same")
    ] = None
    steps: Annotated[
        int | None, Option("end after so many steps, in as many epochs as it takes; the schedule with them")
    ] = None
    pilot: bool = False
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
            units=self.units,
            block_size=self.block_size,
            threshold=self.threshold,
            total_steps=total_steps,
            batch_size=self.batch_size,
            classes=classes,
            seed=self.model_seed,
            **{"neurons": True, **self.pruning, **self._if_given()},
        )

    def _if_given(self) -> dict[str, Any]:
        rate: str | float | None = self.sparse_rate
        if rate is not None and rate != "auto":
            try:
                rate = float(rate)
            except ValueError:
                raise ValueError(f"sparse_rate must be 'auto' or a number, got {rate!r}") from None
        given = {"initial_sparsity": self.initial_sparsity, "sparse_learning_rate": rate}
        rewiring = ("rewire", "rewire_growth", "rewire_score", "rewire_until", "rewire_audit")
        names = ("target_of", "trial_budget", *rewiring)
        given.update({name: getattr(self, name) for name in names})
        return {name: value for name, value in given.items() if value is not None}

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


class TaskOptions(TypedDict, total=False):
    """The settings that some tasks have; `Task.options` says which, and with which defaults."""

    train_samples: Annotated[int, Option("train on this many samples, drawn by class; 0: on all")]
    width: Annotated[float, Option("cifar10: channels relative to ResNet-18")]
    tokens: Annotated[int, Option("lm: train on this many tokens; 0: on all")]
    size: Annotated[str, Option("imdb, lm, speech: size of the model")]
    init: Annotated[str, Option("imdb, speech: scratch, pretrained or a folder")]
    pretrain_epochs: Annotated[
        int, Option("imdb: epochs of masked-language modelling on the task's text before")
    ]
    max_length: Annotated[int, Option("imdb: tokens per text")]
    context: Annotated[int, Option("lm: tokens per sample")]
    max_seconds: Annotated[float, Option("speech: longest clip; 0: the task's own")]
    objective: Annotated[str, Option("common_voice: ctc or language")]


@dataclass(frozen=True)
class Resuming:
    """Where arms keep their checkpoints, and how often they write one: no result depends on it."""

    checkpoints: Annotated[
        str | None, Option("folder for the arms' checkpoints [default: in the arm's own folder]")
    ] = None
    checkpoint_minutes: Annotated[
        float, Option("write one so often, and after every epoch [default: 10]")
    ] = 10.0
    restart: Annotated[bool, Option("train unfinished arms from their start, not from a checkpoint")] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.checkpoint_minutes) and self.checkpoint_minutes >= 0):
            raise ValueError(f"checkpoint_minutes must be at least 0, got {self.checkpoint_minutes}")
        if self.checkpoints is not None and Path(self.checkpoints).expanduser().is_file():
            raise ValueError(f"--checkpoints must be a folder, and {self.checkpoints} is a file")

    @classmethod
    def given(cls, **given: Any) -> Resuming:
        """The defaults, and what was given: None means not given."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    def within(self, name: str) -> Resuming:
        """For one run of several: its checkpoints lie in a folder ``name`` of their own."""
        if self.checkpoints is None:
            return self
        return replace(self, checkpoints=str(Path(self.checkpoints, name)))

    def folder(self, arm: str, out: Path) -> Path:
        """Where the checkpoints of an arm lie that writes into ``out``."""
        return out / "checkpoint" if self.checkpoints is None else Path(self.checkpoints).expanduser() / arm


class Setting(NamedTuple):
    """A setting as an option of the command line; a ``kind`` of bool is a flag."""

    name: str
    kind: Any
    help: str


def _options_of(declared: type) -> Iterator[tuple[str, Any, Option]]:
    for name, hint in get_type_hints(declared, include_extras=True).items():
        kind, *said = get_args(hint) or (hint,)
        if said and isinstance(said[0], Option):
            yield name, kind, said[0]


def settings() -> Iterator[Setting]:
    """Every setting that a user may give, in the order of the command line's help."""
    for declared in (RunConfig, TaskOptions, Resuming):
        for name, kind, option in _options_of(declared):
            yield Setting(name, kind, option.help)
            if option.flag is not None:
                yield Setting(option.flag[0], bool, option.flag[1])


def literal_settings() -> dict[str, Any]:
    """The preset "paper": the experiment's literal settings, whatever a task's defaults are."""
    return {name: getattr(RunConfig, name) for name, _, option in _options_of(RunConfig) if option.literal}


def _device(name: str) -> str:
    import torch

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
    for name in ("epochs", "batch_size", "patience", "block_size", "steps"):
        value = getattr(config, name)
        if name == "steps" and value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    _positive("lr", config.lr)
    samples = config.calibration_samples
    if not isinstance(samples, int) or samples < 0:
        raise ValueError(f"calibration_samples must be a whole number of at least 0, got {samples!r}")
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
    from dynaprune.experiment.tasks.data import on_hub

    if (
        config.data is not None
        and not on_hub(config.data)
        and not Path(str(config.data)).expanduser().is_dir()
    ):
        raise ValueError(f"data must be 'hub', 'hub@COMMIT' or a folder, and {config.data} is not a folder")
    config.pruning_config(total_steps=1000)
    return config


def differing_settings(found: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which ``found``, read from JSON, differs from ``config``: both values by name.

    A setting that an earlier version did not know counts there as its default."""
    theirs = {**RunConfig(task=config.task).to_json(), **found}
    theirs, mine = (json.loads(json.dumps(each)) for each in (theirs, config.to_json()))
    names = sorted(theirs.keys() | mine.keys())
    return {n: (theirs.get(n), mine.get(n)) for n in names if theirs.get(n) != mine.get(n)}


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
    config = RunConfig(task=task, preset=preset, **known.defaults)
    chosen: dict[str, Any] = {}
    if preset is not None:
        presets = {"paper": literal_settings(), **known.presets}
        if preset not in presets:
            raise ValueError(f"{task} has the presets {', '.join(presets)}, got {preset!r}")
        settings = dict(presets[preset])
        chosen = dict(settings.pop("options", {}))
        config = replace(config, **settings)
    if self_paced:
        if given.get("target_sparsity") is not None:
            raise ValueError("--self-paced has no target: leave --target-sparsity out")
        config = replace(config, target_sparsity=None, pruning=dict(known.self_paced))
    chosen.update({k: v for k, v in (options or {}).items() if v is not None})
    config = replace(
        config, options=_options(known, chosen), **{k: v for k, v in given.items() if v is not None}
    )
    return check(replace(config, device=_device(given.get("device") or "auto")))
