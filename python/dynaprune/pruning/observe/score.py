"""What a score is: it ranks blocks and neurons, higher means keep. How likely harm is, no score can say.

Every statistic is kept per block (not per slot, which a block can lose) and per output neuron, on the layer's
device, in :attr:`LayerState.statistics`; nothing here syncs with the host. Blocks count their own
observations, so that one that grew back starts afresh with its own bias correction; a live block never
observed scores infinity: what is unknown is kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune_kernels import BlockSaliency

BLOCK, BLOCK_COUNT, NEURON, NEURON_COUNT = "block", "block_count", "neuron", "neuron_count"


@runtime_checkable
class Score(Protocol):
    """One way to rank units. A subclass needs ``name``, ``observe`` and ``scores``; the rest has defaults.

    Attributes:
        name: for reports and saved states.
        decay: of the exponential means, per observation.
        of_gates: what it sums are derivatives by gates, so that it can score any set of weights as one.
        accumulates: it adds up over the steps instead of averaging.
    """

    name: str
    decay: float = 0.99
    of_gates: bool = False
    accumulates: bool = False

    @abstractmethod
    def observe(self, layer: LayerState, saliency: BlockSaliency) -> None:
        """Take in one optimizer step's gradients, as the optimizer sees them.

        Args:
            layer: its live mask says which entries of ``saliency`` count.
            saliency: sums per block ``[rows, columns]`` and per neuron ``[out]``.
        """

    @abstractmethod
    def scores(self, layer: LayerState, live: Tensor) -> Tensor:
        """Float ``[rows, columns]``, higher = keep; undefined where no block lives.

        Args:
            live: bool ``[rows, columns]``, the blocks to take for live: a policy may ask what would be left.
        """

    def neuron_scores(self, layer: LayerState) -> Tensor:
        """Float ``[out]``, higher = keep. Default: the sum over the live blocks of the neuron's row."""
        live = layer.mask
        rows = torch.where(live, self.scores(layer, live), 0).sum(1)
        return rows.repeat_interleave(layer.layer.layout.block.outputs)[: layer.layer.layout.out_features]

    def gated(self, derivative: Tensor) -> Tensor:
        """What gates with these derivatives ``dL/dgate`` count in one step, elementwise; see ``of_gates``."""
        raise NotImplementedError(f"the score {self.name!r} is not made of gates")

    def attach(self, layers: Mapping[str, LayerState]) -> None:
        """Register what hooks the score needs on the layers."""

    def detach(self) -> None:
        """Remove the hooks of :meth:`attach`."""

    def state_dict(self) -> dict[str, Any]:
        """What the score keeps beside the layers' statistics: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Adopt a saved state."""


def statistics_of(layer: LayerState) -> dict[str, Tensor]:
    """A mean and a count per block and per neuron, on the layer's device.

    Zeros at first, and where the layer has changed its size without them.
    """
    mask, statistics = layer.mask, layer.statistics
    dtype = torch.float64 if layer.layer.values.dtype == torch.float64 else torch.float32
    neurons = torch.Size([layer.layer.layout.out_features])
    for value, count, shape in ((BLOCK, BLOCK_COUNT, mask.shape), (NEURON, NEURON_COUNT, neurons)):
        if value not in statistics or statistics[value].shape != shape:
            statistics[value] = torch.zeros(shape, dtype=dtype, device=mask.device)
            statistics[count] = torch.zeros(shape, dtype=torch.float32, device=mask.device)
        elif statistics[value].device != mask.device:
            statistics[value] = statistics[value].to(mask.device)
            statistics[count] = statistics[count].to(mask.device)
    return statistics


def correct_bias(mean: Tensor, count: Tensor, decay: float) -> Tensor:
    """An exponential mean that started at zero over the weight of its ``count`` terms; inf where none."""
    weight = 1 - torch.pow(decay, count.double())
    return torch.where(count > 0, mean / weight, torch.inf).to(mean.dtype)


class MeanScore(Score):
    """Bias-corrected exponential mean (Kingma & Ba 2015, section 3) of a number per unit and step."""

    def __init__(self, *, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.decay = float(decay)

    @abstractmethod
    def step(self, layer: LayerState, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        """This step's value per block ``[rows, columns]`` and per neuron ``[out]``."""

    def observe(self, layer: LayerState, saliency: BlockSaliency) -> None:
        blocks, neurons = self.step(layer, saliency)
        statistics = statistics_of(layer)
        mean = statistics[BLOCK]
        mean.add_(torch.where(layer.mask, blocks.to(mean.dtype) - mean, 0), alpha=1 - self.decay)
        statistics[BLOCK_COUNT].add_(layer.mask)
        statistics[NEURON].lerp_(neurons.to(mean.dtype), 1 - self.decay)
        statistics[NEURON_COUNT].add_(1)

    def scores(self, layer: LayerState, live: Tensor) -> Tensor:
        statistics = statistics_of(layer)
        return correct_bias(statistics[BLOCK], statistics[BLOCK_COUNT], self.decay)

    def neuron_scores(self, layer: LayerState) -> Tensor:
        statistics = statistics_of(layer)
        return correct_bias(statistics[NEURON], statistics[NEURON_COUNT], self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.decay = float(state["decay"])
