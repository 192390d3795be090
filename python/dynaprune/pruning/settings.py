"""The components of a ``PruningConfig``; each checks its own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from dynaprune.families.family import Family, check_families
from dynaprune.pruning.decide.allocation import ALLOCATIONS
from dynaprune.pruning.decide.growth import GRADIENT, GROWTHS
from dynaprune.pruning.decide.initial_masks import INITIAL_ALLOCATIONS
from dynaprune.pruning.decide.pace import LATEST_END
from dynaprune.pruning.decide.setting_checks import count, fraction, number, one_of, strings
from dynaprune.pruning.observe.score import Score
from dynaprune.pruning.observe.scores import SCORES, make_score
from dynaprune_kernels.geometry import check_block

COSTS = ("parameters", "flops")
WEIGHTS, FLOPS = TARGETS = ("weights", "flops")
BLOCKS, NEURONS, BOTH = UNITS = ("blocks", "neurons", "both")
DROP_SCORES = ("magnitude", "random")
LAYER_TYPES = {"linear": nn.Linear, "conv2d": nn.Conv2d, "conv1d": nn.Conv1d}


@dataclass(frozen=True)
class Schedule:
    """How far pruning goes, and when.

    Args:
        target_sparsity: share of the prunable weights to remove, in (0, 1). None: self-paced, the trial alone
            decides.
        target_of: what that is a share of. "weights": the prunable ones. "flops": the multiplications and
            additions of all linear layers and convolutions in a forward pass, with ``units="neurons"`` only.
        total_steps: optimizer steps of the whole training; needed with a target. ``attach`` wants them here;
            the callbacks for the Trainer and for Lightning ask their trainer.
        start, end: the schedule's span as fractions of ``total_steps``, ``0 <= start < end <= 0.6``; later
            where blocks are rewired before, see :class:`Rewiring`.
        interval: steps between pruning events. None: twenty events between ``start`` and ``end``, fewer (at
            least ten) where trials would cost more than 5% of training (needs ``batch_size``); 50 when
            self-paced.
        self_paced_share: share of the live units that one self-paced event may remove.
        batch_size: samples per step, for the default interval only.
    """

    target_sparsity: float | None = 0.8
    total_steps: int | None = None
    start: float = 0.05
    end: float = 0.5
    interval: int | None = None
    self_paced_share: float = 0.1
    batch_size: int | None = None
    target_of: str = WEIGHTS

    def __post_init__(self) -> None:
        if self.target_sparsity is not None:
            fraction("target_sparsity", self.target_sparsity)
        one_of("target_of", self.target_of, TARGETS)
        for name in ("total_steps", "interval", "batch_size"):
            count(name, getattr(self, name), optional=True)
        fraction("start", self.start, zero=True)
        fraction("end", self.end)
        fraction("self_paced_share", self.self_paced_share)
        if not self.start < self.end:
            self.check(LATEST_END)

    def check(self, latest: float) -> None:
        """Raise ValueError for a span that does not end after its start, or ends after ``latest``."""
        if not self.start < self.end <= latest:
            raise ValueError(
                f"expected 0 <= start < end <= {latest:g}, got start {self.start} and end {self.end}"
            )


@dataclass(frozen=True)
class SparseStart:
    """How much of the network a training begins with, and how fast that learns.

    Args:
        initial_sparsity: share of the prunable weights that is left out from the first step, in [0, 1):
            random blocks, of which every block row and block column keeps one. 0: training begins dense.
        initial_allocation: how what is kept spreads over layers: "uniform", the same density in each, "erk",
            in proportion to sum(shape) / prod(shape) (Evci et al. 2020, arXiv:1911.11134), which costs more
            FLOPs, or, with a calibration, "global": the best blocks of all layers together.
        mask_pretrained: leave out random blocks although the weights look trained.
        sparse_learning_rate: by how much block values of layers that begin sparse learn faster than all else:
            "auto", about 1 / density and at most 4 (see ``learning_rate.rate_multiplier``), or a number; 1
            turns it off.
    """

    initial_sparsity: float = 0.0
    initial_allocation: str = "uniform"
    mask_pretrained: bool = False
    sparse_learning_rate: str | float = "auto"

    def __post_init__(self) -> None:
        fraction("initial_sparsity", self.initial_sparsity, zero=True)
        one_of("initial_allocation", self.initial_allocation, INITIAL_ALLOCATIONS)
        if not isinstance(self.mask_pretrained, bool):
            raise TypeError(f"expected mask_pretrained to be True or False, got {self.mask_pretrained!r}")
        if self.sparse_learning_rate != "auto":
            if isinstance(self.sparse_learning_rate, str):
                raise ValueError(
                    f"expected sparse_learning_rate as 'auto' or a number, got {self.sparse_learning_rate!r}"
                )
            number("sparse_learning_rate", self.sparse_learning_rate)
            if self.sparse_learning_rate <= 0:
                raise ValueError(f"expected a sparse_learning_rate above 0, got {self.sparse_learning_rate}")

    def check(self, target: float | None, regrow: float) -> None:
        """Raise ValueError for a target, or for regrowth, that the start leaves no room for."""
        if target is None or not self.initial_sparsity:
            return
        if target < self.initial_sparsity:
            raise ValueError(
                f"expected a target_sparsity of at least the initial_sparsity ({self.initial_sparsity}), got "
                f"{target}: give both the same value to keep the number of blocks"
            )
        if target == self.initial_sparsity and regrow:
            raise ValueError(
                f"expected a target_sparsity above the initial_sparsity ({target}) beside regrow: a share of "
                "what an event removes grows back, and between equal sparsities nothing is removed; rewire "
                "lets blocks change places there"
            )


@dataclass(frozen=True)
class Rewiring:
    """What blocks change places, and what returns.

    Args:
        rewire: drop and grow: this share of each layer's live blocks goes per event, and as many begin
            elsewhere in the layer; cosine-annealed to 0 at ``rewire_until`` (RigL, Evci et al. 2020,
            arXiv:1911.11134). 0: none.
        rewire_growth: where blocks begin: "gradient", where the squared norm of the dense gradient over the
            mean square of the block's inputs is largest, or "random".
        rewire_score: what goes: None, what has the least ``score``; or "magnitude" or "random".
        rewire_until: fraction of training at which rewiring stops. What a higher ``target_sparsity`` asks for
            is removed after it, up to ``end``; an ``end`` before it gives way to 60% of what is left.
        rewire_audit: so many events of rewiring, evenly spread, test the blocks that go as a removal would be
            tested. They go whatever comes of it; the report counts those that would have failed. 0: none.
        regrow: fraction of the blocks that an event removes which returns, where the dense gradient is
            largest; cosine-annealed to 0 at ``end``. 0: none.
    """

    rewire: float = 0.0
    rewire_growth: str = GRADIENT
    rewire_score: str | None = None
    rewire_until: float = 0.75
    rewire_audit: int = 0
    regrow: float = 0.0

    def __post_init__(self) -> None:
        fraction("rewire", self.rewire, zero=True)
        one_of("rewire_growth", self.rewire_growth, GROWTHS)
        if self.rewire_score is not None:
            one_of("rewire_score", self.rewire_score, DROP_SCORES)
        fraction("rewire_until", self.rewire_until)
        count("rewire_audit", self.rewire_audit, least=0)
        fraction("regrow", self.regrow, zero=True)
        if self.rewire_audit and not self.rewire:
            raise ValueError(
                f"expected rewire beside rewire_audit, got {self.rewire} and {self.rewire_audit}: there is "
                "no swap to test"
            )
        if self.rewire and self.regrow:
            raise ValueError(
                f"expected rewire or regrow, got {self.rewire} and {self.regrow}: regrow lets part of what "
                "is removed return, rewire changes places at a constant number of blocks"
            )

    @property
    def latest_end(self) -> float:
        """Fraction of training by which removals have to end: 60% of what is left when they may begin."""
        begins = self.rewire_until if self.rewire else 0.0
        return round(begins + LATEST_END * (1 - begins), 12)

    def span(self, start: float, end: float) -> tuple[float, float]:
        """When removals begin and end, of a schedule that asks for ``start`` and ``end``."""
        if not self.rewire:
            return start, end
        begins = max(start, self.rewire_until)
        return begins, end if end > begins else self.latest_end


@dataclass(frozen=True, init=False)
class Regrowth(Rewiring):
    """A :class:`Rewiring` of which only ``regrow`` is set."""

    def __init__(self, regrow: float = 0.0) -> None:
        super().__init__(regrow=regrow)


@dataclass(frozen=True)
class Scope:
    """Which layers are pruned, in which blocks, and what may leave them.

    With ``units="neurons"`` names and types say whose neurons may go. A layer loses inputs wherever what it
    reads goes.

    Args:
        block_size: outputs and inputs per block, 8 to 128; one number for square blocks.
        types: layer types to prune, of "linear", "conv2d" and "conv1d".
        include, exclude: layer names, parents' names or ``re:`` patterns (see ``dynaprune.nn.swap_layers``).
        floor: least density that any layer keeps, in [0, 1); for whole neurons the least share of its first
            outputs.
        floors: other floors by layer name.
        neurons: cut dead neurons out of the network, which changes nothing that it computes.
        compact: drop free slots from weights, gradients and optimizer state as the network shrinks.
        families: of your own, beside those that are built in: see ``dynaprune.Family``.
        units: what goes. "blocks" of block-sparse layers. "neurons": whole neurons, channels and heads of
            plain layers, which get narrower and stay plain. "both": blocks and whole neurons, by turns.
    """

    block_size: int | tuple[int, int] = 32
    types: Sequence[str] = ("linear", "conv2d", "conv1d")
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    floor: float = 0.02
    floors: Mapping[str, float] = field(default_factory=dict)
    neurons: bool = True
    compact: bool = True
    families: Sequence[Family] = ()
    units: str = BLOCKS

    def __post_init__(self) -> None:
        one_of("units", self.units, UNITS)
        check_families(self.families)
        check_block(self.block_size)
        fraction("floor", self.floor, zero=True)
        if not isinstance(self.floors, Mapping):
            raise TypeError(f"expected floors as a mapping of layer names to densities, got {self.floors!r}")
        for name, floor in self.floors.items():
            fraction(f"floors[{name!r}]", floor, zero=True, one=True)
        for name in ("types", "include", "exclude"):
            if not (name == "include" and self.include is None):
                strings(name, getattr(self, name))
        for name in self.types:
            one_of("types", name, tuple(LAYER_TYPES))
        if not self.types:
            raise ValueError(f"expected at least one of {', '.join(LAYER_TYPES)} in types, got none")
        for name in ("neurons", "compact"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"expected {name} to be True or False, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Ranking:
    """What goes first.

    Args:
        score: one of ``SCORES``, or a ``dynaprune.Score`` of your own.
        score_decay: decay per observation of a built-in score's exponential mean, in [0, 1).
        allocation: how removals spread over layers: one of ``ALLOCATIONS``.
        cost: rank by score per parameter or per FLOP saved.
        seed: of random scores, random ties and the blocks that a sparse start keeps.
    """

    score: str | Score = "second_moment"
    score_decay: float = 0.99
    allocation: str = "global"
    cost: str = "parameters"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            one_of("score", self.score, tuple(SCORES))
        else:
            make_score(self.score)
        fraction("score_decay", self.score_decay, zero=True)
        one_of("allocation", self.allocation, ALLOCATIONS)
        one_of("cost", self.cost, COSTS)
        count("seed", self.seed, least=0)
