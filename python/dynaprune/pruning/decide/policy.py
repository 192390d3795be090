"""What a policy is: it looks at the structure and says which blocks should go or come back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dynaprune.pruning.decide.neuron_choice import Unit, Width
from dynaprune.pruning.decide.neuron_order import NeuronFigures
from dynaprune.pruning.decide.swap_audit import SwapAudit
from dynaprune.pruning.decide.trial import Losses
from dynaprune.pruning.decide.trials import Trials
from dynaprune.pruning.edit.edits import Cut, Grow, Release, Rewire


@dataclass(frozen=True, eq=False)
class LayerView:
    """One layer as a policy sees it. Tensors are copies: writing to them changes nothing.

    Attributes:
        mask: bool ``[rows, columns]``, the live blocks.
        protected: bool ``[rows, columns]``, blocks that came back lately, or all where no gradient was seen.
        probe: float ``[rows, columns]``, squared norms of the dense gradient at dead blocks; over the mean
            squares of the inputs that they read, where the policy swaps by gradient. None where nothing
            grows.
        capacity: slots, live or free.
        original: shape of the dense weight at attach.
        floor: live blocks that have to stay; at least one.
        floor_share: the share of the blocks that ``floor`` comes from.
        flops_per_block: FLOPs of a training step that a block costs.
        scores: ``scores(live)``, float ``[rows, columns]``, higher = keep, with ``live`` for the live blocks.
        neuron_scores: float ``[out]``, higher = keep.
        drop_scores: what swaps go by, where that is not ``scores``.
    """

    mask: Tensor
    protected: Tensor
    probe: Tensor | None
    capacity: int
    original: tuple[int, ...]
    floor: int
    floor_share: float
    flops_per_block: float
    scores: Callable[[Tensor], Tensor]
    neuron_scores: Callable[[], Tensor]
    drop_scores: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class WholeNeurons:
    """Whole neurons as a policy sees them.

    Attributes:
        units: groups of neurons that may go and were seen at work.
        widths: of the layers that they belong to.
        losses: ``losses(units)``, per-sample losses while these are silent, ``[]`` for the model as it
            stands. All calls of one event see the same samples. None where nothing is tested.
        cannot_go: ``cannot_go(units)``, numbers of those that the model cannot lose: the cut was tried on the
            example inputs. They are left out of later events.
        cut: ``cut(units, why)``, the cut of them, each with the reason for which it goes (see ``Release``);
            None where nothing can go.
        total, left: what the target is a share of, at first and now: weights, or forward FLOPs. Widths count
            the same.
    """

    units: Sequence[Unit]
    widths: Mapping[str, Width]
    losses: Callable[[Sequence[Unit]], Losses] | None
    cannot_go: Callable[[Sequence[Unit]], set[int]]
    cut: Callable[[Sequence[Unit], Sequence[str]], Cut | None]
    total: int
    left: int


@dataclass(frozen=True, eq=False)
class View:
    """What a policy decides from.

    Attributes:
        step: optimizer steps done.
        layers: the pruned layers, by name.
        units, live_units: blocks at attach, and those that live (in blocks of average size).
        weights, live_weights: prunable weights at attach, and those that live; 0 until they are known.
        losses: ``losses(masks)``, per-sample losses with the blocks of ``masks`` suspended, ``{}`` for the
            model as it stands. All calls of one event see the same samples. None where nothing is tested.
        neurons: what whole neurons are worth; None where the model cannot be traced.
        whole: whole neurons that may go as units of their own; None where units are blocks only, or where
            the model cannot be traced.
    """

    step: int
    layers: Mapping[str, LayerView]
    units: int
    live_units: int
    weights: int
    live_weights: int
    losses: Callable[[Mapping[str, Tensor]], Losses] | None
    neurons: Callable[[], NeuronFigures | None]
    whole: Callable[[], WholeNeurons | None]


@runtime_checkable
class Policy(Protocol):
    """Decides which blocks go and which return. A subclass needs ``due`` and ``decide``.

    Attributes:
        interval: steps between events as a rule; the score sees at least eight of them.
        trials: what was tried so far, for the report; None for a policy that tries nothing.
        grows: blocks may return: layers then measure their dense gradient before an event, and keep spare
            slots.
        swaps_by_gradient: blocks may change places by the dense gradient, which layers then measure before an
            event, over the mean squares of the inputs. Such blocks need no spare slots.
        audit: what trials say of drops that go without one, for the report; None for a policy without swaps.
    """

    interval: int = 100
    trials: Trials | None = None
    grows: bool = False
    swaps_by_gradient: bool = False
    audit: SwapAudit | None = None

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether an event comes after this step; steps count from 1."""

    @abstractmethod
    def decide(self, view: View) -> Sequence[Release | Grow | Cut | Rewire]:
        """The changes, in the order in which they are carried out. Nothing is changed here."""

    def probes(self, step: int) -> bool:
        """Whether this step measures the dense gradient, which an event after it needs."""
        return (self.grows or self.swaps_by_gradient) and self.due(step)

    def ended(self, step: int) -> bool:
        """Whether the schedule is over: then the best model counts, and capacities become exact."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved run."""
        return None
