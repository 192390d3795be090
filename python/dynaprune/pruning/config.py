"""``PruningConfig``: every setting of a pruner, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

from torch import nn

from dynaprune.pruning.decide.allocation import ALLOCATIONS
from dynaprune.pruning.observe.score import SCORES
from dynaprune_kernels.geometry import check_block

COSTS = ("parameters", "flops")
_LAYER_TYPES = {"linear": nn.Linear, "conv2d": nn.Conv2d, "conv1d": nn.Conv1d}


@dataclass(frozen=True)
class PruningConfig:
    """What is pruned, how far, how fast, and what a removal has to satisfy.

    Args:
        target_sparsity: share of the prunable weights to remove, in (0, 1). None: self-paced, the trial alone
            decides.
        block_size: outputs and inputs per block, 8 to 128; one number for square blocks.
        total_steps: optimizer steps of the whole training; needed with a target. ``attach`` wants them here;
            the callbacks for the Trainer and for Lightning ask their trainer.
        start, end: the schedule's span as fractions of ``total_steps``, ``0 <= start < end <= 0.6``.
        interval: steps between pruning events. None: twenty events between ``start`` and ``end``, fewer (at
            least ten) where trials would cost more than 5% of training (needs ``batch_size``); 50 when
            self-paced.
        score: which units go first: one of ``SCORES``.
        score_decay: decay per observation of the score's exponential mean, in [0, 1).
        allocation: how removals spread over layers: one of ``ALLOCATIONS``.
        cost: rank by score per parameter or per FLOP saved.
        floor: least density that any layer keeps, in [0, 1).
        floors: other floors by layer name.
        threshold: nominal probability, per event, of accepting a removal that harms by the tolerance or more.
        tolerance: relative tolerance of one event, as a share of the mean loss.
        absolute_tolerance: the same as a share of ln C nats (C classes); the larger of the two holds.
        allowance: rise in mean loss over all accepted removals of the run, as a share of ln C nats.
        classes: number of classes C; None: from the trial's labels, or its first loss.
        rungs: candidate sets per event: wish, wish/2, wish/4, ...
        self_paced_share: share of the live units that one self-paced event may remove.
        regrow: fraction of the removed blocks that returns per event, cosine-annealed to 0 at ``end``; 0:
            none.
        neurons: cut dead neurons out of the network, which changes nothing that it computes.
        types: layer types to prune, of "linear", "conv2d" and "conv1d".
        include, exclude: layer names, parents' names or ``re:`` patterns (see ``dynaprune.nn.swap_layers``).
        observe_every: observe every k-th step. None: the least k whose cost is 2% of a step by a model of
            memory traffic.
        batch_size: samples per step, for the default interval only.
        compact: drop free slots from weights, gradients and optimizer state as the network shrinks.
        seed: of random scores and random ties.

    Raises:
        TypeError, ValueError: with the setting, what was expected and what came.
    """

    target_sparsity: float | None = 0.8
    block_size: int | tuple[int, int] = 32
    total_steps: int | None = None
    start: float = 0.05
    end: float = 0.5
    interval: int | None = None
    score: str = "second_moment"
    score_decay: float = 0.99
    allocation: str = "global"
    cost: str = "parameters"
    floor: float = 0.02
    floors: Mapping[str, float] = field(default_factory=dict)
    threshold: float = 0.01
    tolerance: float = 0.01
    absolute_tolerance: float = 0.01
    allowance: float = 0.05
    classes: int | None = None
    rungs: int = 3
    self_paced_share: float = 0.1
    regrow: float = 0.0
    neurons: bool = True
    types: Sequence[str] = ("linear", "conv2d", "conv1d")
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    observe_every: int | None = None
    batch_size: int | None = None
    compact: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_block(self.block_size)
        if self.target_sparsity is not None:
            _fraction("target_sparsity", self.target_sparsity)
        for name in ("total_steps", "interval", "rungs", "observe_every", "batch_size"):
            _count(name, getattr(self, name), optional=name != "rungs")
        _count("classes", self.classes, optional=True, least=2)
        _count("seed", self.seed, least=0)
        _fraction("threshold", self.threshold)
        _fraction("start", self.start, zero=True)
        _fraction("end", self.end)
        if not self.start < self.end <= 0.6:
            raise ValueError(f"expected 0 <= start < end <= 0.6, got start {self.start} and end {self.end}")
        for name in ("tolerance", "absolute_tolerance", "allowance"):
            _number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")
        for name in ("floor", "regrow", "score_decay"):
            _fraction(name, getattr(self, name), zero=True)
        _fraction("self_paced_share", self.self_paced_share)
        _one_of("score", self.score, tuple(SCORES))
        _one_of("allocation", self.allocation, ALLOCATIONS)
        _one_of("cost", self.cost, COSTS)
        self._check_names()

    def _check_names(self) -> None:
        if not isinstance(self.floors, Mapping):
            raise TypeError(f"expected floors as a mapping of layer names to densities, got {self.floors!r}")
        for name, floor in self.floors.items():
            _fraction(f"floors[{name!r}]", floor, zero=True, one=True)
        for name in ("types", "include", "exclude"):
            value = getattr(self, name)
            if name == "include" and value is None:
                continue
            if (
                isinstance(value, str)
                or not isinstance(value, Sequence)
                or not all(isinstance(v, str) for v in value)
            ):
                raise TypeError(f"expected {name} as a sequence of strings, got {value!r}")
        for name in self.types:
            _one_of("types", name, tuple(_LAYER_TYPES))
        if not self.types:
            raise ValueError(f"expected at least one of {', '.join(_LAYER_TYPES)} in types, got none")
        for name in ("neurons", "compact"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"expected {name} to be True or False, got {getattr(self, name)!r}")

    def require_total_steps(self) -> None:
        """Raise ValueError where the schedule needs ``total_steps`` and has none."""
        if self.total_steps is not None:
            return
        if self.target_sparsity is not None:
            raise ValueError(
                "expected total_steps (optimizer steps of the whole training) beside a target_sparsity, got "
                "None: the schedule needs to know when training ends"
            )
        if self.regrow:
            raise ValueError("expected total_steps beside regrow, which ends at `end` of training, got None")

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        """The torch layer types named by ``types``."""
        return tuple(_LAYER_TYPES[name] for name in self.types)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values, fit for JSON."""
        plain = asdict(self)
        plain["floors"] = dict(self.floors)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite {name}, got {value}")


def _fraction(name: str, value: Any, *, zero: bool = False, one: bool = False) -> None:
    _number(name, value)
    if not ((value > 0 or (zero and value == 0)) and (value < 1 or (one and value == 1))):
        raise ValueError(f"expected {name} in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value}")


def _count(name: str, value: Any, *, optional: bool = False, least: int = 1) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {name} to be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
