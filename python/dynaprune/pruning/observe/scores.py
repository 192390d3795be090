"""The scores that are built in, by name."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.edit.layer_state import LayerState
from dynaprune.pruning.observe.score import (
    BLOCK,
    NEURON,
    NEURON_COUNT,
    MeanScore,
    Score,
    correct_bias,
    statistics_of,
)
from dynaprune_kernels import BlockSaliency, block_saliency


class SecondMoment(MeanScore):
    """``E[s^2]`` with the gate derivative ``s = sum_{w in u} w dL/dw``: the diagonal of the Fisher
    information of a gate on the unit (Theis et al. 2018, arXiv:1801.05787, eq. 6; Molchanov et al. 2019,
    arXiv:1906.10771, eq. 8)."""

    name = "second_moment"
    of_gates = True

    def gated(self, derivative: Tensor) -> Tensor:
        return derivative.square()

    def step(self, layer: LayerState, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        return saliency.weight_grad.square(), saliency.neuron_weight_grad.square()


class Taylor(MeanScore):
    """``E[sum |w dL/dw|]``, first-order Taylor (Molchanov et al. 2017, arXiv:1611.06440, eq. 7, per weight);
    for a neuron ``E|sum w dL/dw|``, which is |activation x gradient| of its pre-activation."""

    name = "taylor"
    of_gates = True

    def gated(self, derivative: Tensor) -> Tensor:
        return derivative.abs()

    def step(self, layer: LayerState, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        return saliency.weight_grad_abs, saliency.neuron_weight_grad.abs()


class Gradient(MeanScore):
    """``E[sum (dL/dw)^2]``: squared gradient norm (SNFS and RigL grow by its like: Evci et al. 2020)."""

    name = "gradient"

    def step(self, layer: LayerState, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        grad = layer.layer.values.grad
        if grad is None:
            raise ValueError("expected a layer whose values have a gradient, got None")
        own = block_saliency(grad, grad, layer.layer.layout)
        # The saliency may be of the unscaled gradient where the Parameter still holds a scaled one.
        total = own.grad_square.sum().clamp(min=torch.finfo(own.grad_square.dtype).tiny)
        return saliency.grad_square, own.neuron_weight_grad * (saliency.grad_square.sum() / total)


class Movement(Score):
    """Accumulated ``-sum w dL/dw``: weights that move away from zero stay (Sanh et al. 2020,
    arXiv:2005.07683, eq. 4, summed per block as in Lagunas et al. 2021)."""

    name = "movement"
    of_gates = True
    accumulates = True

    def gated(self, derivative: Tensor) -> Tensor:
        return -derivative

    def observe(self, layer: LayerState, saliency: BlockSaliency) -> None:
        statistics = statistics_of(layer)
        statistics[BLOCK].sub_(saliency.weight_grad)
        statistics[NEURON].sub_(saliency.neuron_weight_grad)

    def scores(self, layer: LayerState, live: Tensor) -> Tensor:
        return statistics_of(layer)[BLOCK].clone()

    def neuron_scores(self, layer: LayerState) -> Tensor:
        return statistics_of(layer)[NEURON].clone()


class Magnitude(Score):
    """``sum w^2`` over the mean of the layer's live units, which makes layers comparable (magnitude pruning:
    Han et al. 2015, arXiv:1506.02626); read from the weights when asked."""

    name = "magnitude"

    def observe(self, layer: LayerState, saliency: BlockSaliency) -> None:
        pass

    def scores(self, layer: LayerState, live: Tensor) -> Tensor:
        values = layer.layer.values
        square = block_saliency(values, values, layer.layer.layout).weight_square
        return _over_mean(torch.where(live, square, 0), live.sum())

    def neuron_scores(self, layer: LayerState) -> Tensor:
        values = layer.layer.values
        square = block_saliency(values, values, layer.layer.layout).neuron_weight_grad
        return _over_mean(square, (square > 0).sum())


def _over_mean(units: Tensor, live: Tensor) -> Tensor:
    mean = units.sum() / live.clamp(min=1)
    return units / mean.clamp(min=torch.finfo(units.dtype).tiny)


class Activation(Score):
    """Share of samples (and positions) in which an output of the layer is above zero, an exponential mean
    over training forwards: what a ReLU behind it passes (APoZ is its complement: Hu et al. 2016,
    arXiv:1607.03250). A norm between layer and ReLU is not seen. A row's blocks share its neurons' mean."""

    name = "activation"

    def __init__(self, *, decay: float = 0.99) -> None:
        self.decay = float(decay)
        self._hooks: list[Any] = []

    def attach(self, layers: Mapping[str, LayerState]) -> None:
        self._hooks = [state.layer.register_forward_hook(self._hook(state)) for state in layers.values()]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, state: LayerState) -> Any:
        @torch.compiler.disable
        def hook(module: BlockSparseLayer, inputs: Any, output: Tensor) -> None:
            if module.training and torch.is_grad_enabled():
                self._take(state, module, output.detach())

        return hook

    def _take(self, state: LayerState, module: BlockSparseLayer, output: Tensor) -> None:
        weight_dims = getattr(module, "kernel_size", ())
        channels_last = output.movedim(-1 - len(weight_dims), -1)
        statistics = statistics_of(state)
        mean, count = statistics[NEURON], statistics[NEURON_COUNT]
        frequency = (channels_last > 0).reshape(-1, mean.shape[0]).to(mean.dtype).mean(0)
        mean.lerp_(frequency, 1 - self.decay)
        count.add_(1)

    def observe(self, layer: LayerState, saliency: BlockSaliency) -> None:
        pass

    def scores(self, layer: LayerState, live: Tensor) -> Tensor:
        layout, neurons = layer.layer.layout, self.neuron_scores(layer)
        rows = torch.arange(layout.out_features, device=neurons.device) // layout.block.outputs
        total = neurons.new_zeros(layout.rows).index_add_(0, rows, neurons)
        size = neurons.new_zeros(layout.rows).index_add_(0, rows, torch.ones_like(neurons))
        return (total / size).unsqueeze(1).expand(layout.rows, layout.columns).clone()

    def neuron_scores(self, layer: LayerState) -> Tensor:
        statistics = statistics_of(layer)
        return correct_bias(statistics[NEURON], statistics[NEURON_COUNT], self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.decay = float(state["decay"])


class Random(Score):
    """Uniform numbers: the baseline that any score has to beat. Drawn from the seed, the layer's name and the
    number of steps observed, so that each event draws anew and a resumed run draws the same."""

    name = "random"

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = int(seed)

    def observe(self, layer: LayerState, saliency: BlockSaliency) -> None:
        pass

    def _draw(self, layer: LayerState, unit: str, shape: tuple[int, ...]) -> Tensor:
        key = zlib.crc32(f"{self.seed}/{unit}/{layer.observations}/{layer.name}".encode())
        return torch.rand(shape, generator=torch.Generator().manual_seed(key)).to(layer.mask.device)

    def scores(self, layer: LayerState, live: Tensor) -> Tensor:
        return self._draw(layer, BLOCK, tuple(live.shape))

    def neuron_scores(self, layer: LayerState) -> Tensor:
        return self._draw(layer, NEURON, (layer.layer.layout.out_features,))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed = int(state["seed"])


SCORES: dict[str, type[Score]] = {
    score.name: score for score in (SecondMoment, Taylor, Magnitude, Gradient, Movement, Activation, Random)
}


def make_score(score: str | Score, *, seed: int = 0, decay: float = 0.99) -> Score:
    """The score of that name, or the one that is given.

    Args:
        seed: of the random score.
        decay: of exponential means, per observed step.

    Raises:
        ValueError: an unknown name, or a decay outside [0, 1). TypeError: neither a name nor a score.
    """
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"expected a score among {', '.join(sorted(SCORES))}, got {score!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        kind: Any = SCORES[score]
        settings = {"random": {"seed": seed}, "movement": {}, "magnitude": {}}
        return kind(**settings.get(score, {"decay": decay}))
    if not isinstance(score, Score):
        members = ("name", "observe", "scores", "neuron_scores", "state_dict", "load_state_dict")
        missing = [name for name in members if not hasattr(score, name)]
        raise TypeError(
            f"expected a score by name or a dynaprune.Score, got {type(score).__name__} without "
            f"{', '.join(missing) or 'all that dynaprune.Score has'}: subclass dynaprune.Score"
        )
    return score
