"""``PruningConfig``: every setting of a pruner, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import Parameter, Signature
from operator import attrgetter
from typing import Any, ClassVar

from torch import nn

from dynaprune.families.family import Family
from dynaprune.pruning.decide.policy import Policy
from dynaprune.pruning.decide.setting_checks import count
from dynaprune.pruning.decide.trial_rules import TrialRules
from dynaprune.pruning.observe.score import Score
from dynaprune.pruning.observe.scores import SCORES, make_score
from dynaprune.pruning.settings import (
    BLOCKS,
    FLOPS,
    LAYER_TYPES,
    NEURONS,
    Ranking,
    Regrowth,
    Rewiring,
    Schedule,
    Scope,
    SparseStart,
)

GROUPS: dict[str, type[Any]] = {
    "schedule": Schedule,
    "trial_rules": TrialRules,
    "rewiring": Rewiring,
    "scope": Scope,
    "ranking": Ranking,
    "sparse_start": SparseStart,
}
_OLD_NAMES = {"regrowth": "rewiring"}
_OWN = ("observe_every", "policy")


@dataclass(frozen=True, init=False)
class PruningConfig:
    """What is pruned, how far, how fast, and what a removal has to satisfy.

    Settings come one by one, ``PruningConfig(target_sparsity=0.9, total_steps=1000)``, or by component,
    ``PruningConfig(schedule=Schedule(target_sparsity=0.9, total_steps=1000))``. Each component says what its
    settings mean: :class:`Schedule` (how far and when), :class:`TrialRules` (what a removal has to satisfy),
    :class:`Rewiring`, :class:`Scope` (which layers, in which blocks), :class:`Ranking` (what goes first),
    :class:`SparseStart` (what training begins with).

    Args:
        policy: a policy of your own in place of the built-in one; schedule, trial rules and rewiring are then
            read by nobody but you.
        observe_every: observe every k-th step. None: the least k whose cost is 2% of a step by a model of
            memory traffic.

    Raises:
        TypeError, ValueError: with the setting, what was expected and what came; a setting that comes twice.
    """

    target_sparsity: float | None = Schedule.target_sparsity
    block_size: int | tuple[int, int] = Scope.block_size
    total_steps: int | None = Schedule.total_steps
    start: float = Schedule.start
    end: float = Schedule.end
    interval: int | None = Schedule.interval
    score: str | Score = Ranking.score
    score_decay: float = Ranking.score_decay
    allocation: str = Ranking.allocation
    cost: str = Ranking.cost
    floor: float = Scope.floor
    floors: Mapping[str, float] = field(default_factory=dict)
    threshold: float = TrialRules.threshold
    tolerance: float = TrialRules.tolerance
    absolute_tolerance: float = TrialRules.absolute_tolerance
    allowance: float = TrialRules.allowance
    classes: int | None = TrialRules.classes
    rungs: int = TrialRules.rungs
    self_paced_share: float = Schedule.self_paced_share
    regrow: float = Rewiring.regrow
    neurons: bool = Scope.neurons
    types: Sequence[str] = Scope.types
    include: Sequence[str] | None = Scope.include
    exclude: Sequence[str] = Scope.exclude
    observe_every: int | None = None
    batch_size: int | None = Schedule.batch_size
    compact: bool = Scope.compact
    seed: int = Ranking.seed
    policy: Policy | None = None
    families: Sequence[Family] = Scope.families
    units: str = Scope.units
    initial_sparsity: float = SparseStart.initial_sparsity
    initial_allocation: str = SparseStart.initial_allocation
    mask_pretrained: bool = SparseStart.mask_pretrained
    sparse_learning_rate: str | float = SparseStart.sparse_learning_rate
    rewire: float = Rewiring.rewire
    rewire_growth: str = Rewiring.rewire_growth
    rewire_score: str | None = Rewiring.rewire_score
    rewire_until: float = Rewiring.rewire_until
    rewire_audit: int = Rewiring.rewire_audit
    trial_budget: float | None = TrialRules.trial_budget
    target_of: str = Schedule.target_of
    schedule: ClassVar[Schedule]
    trial_rules: ClassVar[TrialRules]
    rewiring: ClassVar[Rewiring]
    scope: ClassVar[Scope]
    ranking: ClassVar[Ranking]
    sparse_start: ClassVar[SparseStart]

    def __init__(self, *settings: Any, **named: Any) -> None:
        flat = {f.name: f for f in fields(self)}
        if len(settings) > len(flat):
            raise TypeError(f"expected at most {len(flat)} settings, got {len(settings)}")
        given = dict(zip(flat, settings, strict=False))
        for name, value in named.items():
            if name in given:
                raise TypeError(f"expected {name} once, got it twice")
            if _OLD_NAMES.get(name, name) in GROUPS:
                for setting, part in _parts(name, value).items():
                    if setting in named or setting in given:
                        raise TypeError(f"expected {setting} in {name} or by itself, got both")
                    given[setting] = part
            elif name in flat:
                given[name] = value
            else:
                raise TypeError(f"expected settings among {', '.join([*flat, *GROUPS])}, got {name!r}")
        for name, f in flat.items():
            given.setdefault(name, {} if name == "floors" else f.default)
        count("observe_every", given["observe_every"], optional=True)
        if given["policy"] is not None and not isinstance(given["policy"], Policy):
            raise TypeError(
                "expected the policy as an object with due(step) and decide(view), got "
                f"{type(given['policy']).__name__}: subclass dynaprune.Policy"
            )
        for name, kind in GROUPS.items():
            object.__setattr__(self, name, kind(**{f.name: given[f.name] for f in fields(kind)}))
        for name in _OWN:
            object.__setattr__(self, f"_{name}", given[name])
        if self.units != BLOCKS:
            _check_whole_neurons(self)
        if self.target_of == FLOPS and (self.units != NEURONS or self.target_sparsity is None):
            raise ValueError(
                f"expected target_of='flops' with units='neurons' and a target_sparsity, got units="
                f"{self.units!r} and {self.target_sparsity}"
            )
        self.schedule.check(self.rewiring.latest_end)
        self.sparse_start.check(self.target_sparsity, self.regrow)

    @property
    def regrowth(self) -> Regrowth:
        """The part of ``rewiring`` that lets removed blocks return."""
        return Regrowth(self.regrow)

    @property
    def stands_still(self) -> bool:
        """Whether training begins at the target: then nothing is removed."""
        return 0 < self.initial_sparsity == self.target_sparsity

    def require_total_steps(self) -> None:
        """Raise ValueError where the schedule needs ``total_steps`` and has none."""
        if self.total_steps is not None or self.policy is not None:
            return
        if self.rewire:
            raise ValueError("expected total_steps beside rewire, which ends at rewire_until of it, got None")
        if self.stands_still:
            return
        if self.target_sparsity is not None:
            raise ValueError(
                "expected total_steps (optimizer steps of the whole training) beside a target_sparsity, got "
                "None: the schedule needs to know when training ends"
            )
        if self.regrow:
            raise ValueError("expected total_steps beside regrow, which ends at `end` of training, got None")

    def for_training(self, total_steps: int, batch_size: int | None) -> PruningConfig:
        """The same settings, with these where they were left open."""
        return replace(
            self,
            total_steps=self.total_steps or total_steps,
            batch_size=self.batch_size or batch_size,
        )

    def floor_of(self, name: str) -> float:
        """Least density that the layer keeps."""
        return self.floors.get(name, self.floor)

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        """The torch layer types named by ``types``."""
        return tuple(LAYER_TYPES[name] for name in self.types)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values, fit for JSON; a score or policy of your own by its name."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["floors"] = dict(self.floors)
        if not isinstance(self.score, str):
            plain["score"] = self.score.name
        policy, families = plain.pop("policy"), plain.pop("families")
        if policy is not None:
            plain["policy"] = type(policy).__name__
        if families:
            plain["families"] = [type(family).__name__ for family in families]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _check_whole_neurons(config: PruningConfig) -> None:
    """Raise ValueError for settings that whole neurons have no use for."""
    where = f"with units={config.units!r}"
    if not make_score(config.score).of_gates:
        of_gates = ", ".join(name for name, kind in SCORES.items() if kind.of_gates)
        name = config.score if isinstance(config.score, str) else config.score.name
        raise ValueError(f"expected a score that is made of gates ({of_gates}) {where}, got {name!r}")
    if not config.neurons:
        raise ValueError(f"expected neurons=True {where}, got False: nothing could be cut")
    if config.regrow and config.units == NEURONS:
        raise ValueError(f"expected regrow=0 {where}, got {config.regrow}: what is cut out does not return")
    if config.rewire and config.units == NEURONS:
        raise ValueError(f"expected rewire=0 {where}, got {config.rewire}: there are no blocks")
    if config.initial_sparsity and config.units == NEURONS:
        raise ValueError(
            f"expected initial_sparsity=0 {where}, got {config.initial_sparsity}: plain layers begin whole"
        )
    if config.stands_still:
        raise ValueError(
            f"expected a target_sparsity above the initial_sparsity ({config.initial_sparsity}) {where}: it "
            "counts the weights of plain layers too, which begin whole"
        )
    if config.allocation == "erk":
        raise ValueError(f"expected allocation 'global' or 'uniform' {where}, got 'erk'")


def _parts(name: str, value: Any) -> dict[str, Any]:
    kind = GROUPS[_OLD_NAMES.get(name, name)]
    if not isinstance(value, kind):
        raise TypeError(f"expected {name} as a {kind.__name__}, got {type(value).__name__}")
    return {f.name: getattr(value, f.name) for f in fields(kind)}


def _read_only(path: str) -> property:
    return property(attrgetter(path))


# A setting lives in its component; by itself it is read through the component.
for _component, _kind in GROUPS.items():
    for _field in fields(_kind):
        setattr(PruningConfig, _field.name, _read_only(f"{_component}.{_field.name}"))
for _name in _OWN:
    setattr(PruningConfig, _name, _read_only(f"_{_name}"))
PruningConfig.__signature__ = Signature(  # type: ignore[attr-defined]
    [
        Parameter(f.name, Parameter.POSITIONAL_OR_KEYWORD, default=f.default, annotation=f.type)
        for f in fields(PruningConfig)
    ]
)
