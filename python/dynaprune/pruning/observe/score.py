"""Scores: which blocks and neurons to remove first. Higher means keep; how likely harm is, no score can say.

Every statistic is kept per block (not per slot, which a block can lose) and per output neuron, on the layer's
device; nothing here syncs with the host. Blocks count their own observations, so that one that grew back
starts afresh with its own bias correction; a live block never observed scores infinity: what is unknown is
kept.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynaprune.nn import BlockSparseLayer
from dynaprune_kernels import BlockLayout, block_saliency
from dynaprune_kernels.functional import BlockSaliency

Statistics = dict[str, Tensor]
_BLOCK, _BLOCK_COUNT, _NEURON, _NEURON_COUNT = "block", "block_count", "neuron", "neuron_count"


class Score(ABC):
    """One way to rank units, with its statistics per layer (by module name).

    Attributes:
        decay: of the exponential means, per observation.
        of_gates: what it sums are derivatives by gates, so that it can score any set of weights as one.
        accumulates: it adds up over the steps instead of averaging.
    """

    name: ClassVar[str]
    of_gates: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.seed, self.decay = int(seed), float(decay)
        self._statistics: dict[str, Statistics] = {}

    def attach(self, modules: Mapping[str, BlockSparseLayer]) -> None:  # noqa: B027  optional, most scores need no hooks
        """Register what hooks the score needs on the layers, by name."""

    def detach(self) -> None:  # noqa: B027
        """Remove the hooks of :meth:`attach`."""

    @abstractmethod
    def observe(self, name: str, module: BlockSparseLayer, saliency: BlockSaliency) -> None:
        """Take in one optimizer step's gradients, as the optimizer sees them.

        Args:
            module: a block-sparse layer; its live mask says which entries of ``saliency`` count.
            saliency: sums per block ``[rows, columns]`` and per neuron ``[out]``.
        """

    @abstractmethod
    def scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        """Float ``[rows, columns]``, higher = keep; undefined where no block lives."""

    @abstractmethod
    def neuron_scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        """Float ``[out]``, higher = keep."""

    def gated(self, derivative: Tensor) -> Tensor:
        """What gates with these derivatives ``dL/dgate`` count in one step, elementwise; see ``of_gates``."""
        raise NotImplementedError(f"the score {self.name!r} is not made of gates")

    def forget(self, name: str, blocks: Tensor) -> None:
        """Start the statistics of ``blocks`` (bool ``[rows, columns]``) afresh: they grew back."""
        for key, tensor in self._statistics.get(name, {}).items():
            if key.startswith(_BLOCK):
                tensor.masked_fill_(blocks.to(tensor.device), 0)

    def keep(
        self, name: str, rows: Tensor | None, columns: Tensor | None, neurons: Tensor | None = None
    ) -> None:
        """Slice the statistics after neurons were cut.

        Args:
            rows, columns: int64 block rows and block columns that stay, in their new order; None for all.
            neurons: int64 outputs that stay. Without them the neurons' statistics start afresh once ``rows``
                has changed how many there are.
        """
        for key, tensor in self._statistics.get(name, {}).items():
            if key.startswith(_BLOCK):
                tensor = tensor if rows is None else tensor[rows.to(tensor.device)]
                tensor = tensor if columns is None else tensor[:, columns.to(tensor.device)]
            elif neurons is not None:
                tensor = tensor[neurons.to(tensor.device)]
            self._statistics[name][key] = tensor

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; the tensors are copies."""
        layers = {n: {k: t.clone() for k, t in s.items()} for n, s in self._statistics.items()}
        return {"name": self.name, "seed": self.seed, "decay": self.decay, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Adopt a saved state.

        Raises:
            ValueError: the state of another score.
        """
        if state.get("name") != self.name:
            raise ValueError(
                f"expected the state of the score {self.name!r}, got that of {state.get('name')!r}"
            )
        self.seed, self.decay = int(state["seed"]), float(state["decay"])
        self._statistics = {n: {k: t.clone() for k, t in s.items()} for n, s in state["layers"].items()}

    def _of(self, name: str, module: BlockSparseLayer) -> Statistics:
        """The layer's statistics on its device; zeros at first and where the layer has changed its size."""
        mask, statistics = _layout(module).mask, self._statistics.setdefault(name, {})
        dtype = torch.float64 if module.values.dtype == torch.float64 else torch.float32
        neurons = torch.Size([_layout(module).out_features])
        for value, count, shape in ((_BLOCK, _BLOCK_COUNT, mask.shape), (_NEURON, _NEURON_COUNT, neurons)):
            if value not in statistics or statistics[value].shape != shape:
                statistics[value] = torch.zeros(shape, dtype=dtype, device=mask.device)
                statistics[count] = torch.zeros(shape, dtype=torch.float32, device=mask.device)
            elif statistics[value].device != mask.device:
                statistics[value] = statistics[value].to(mask.device)
                statistics[count] = statistics[count].to(mask.device)
        return statistics


def _layout(module: BlockSparseLayer) -> BlockLayout:
    if not isinstance(module, BlockSparseLayer):
        raise TypeError(f"expected a block-sparse layer, got {type(module).__name__}")
    return module.layout


def _correct_bias(mean: Tensor, count: Tensor, decay: float) -> Tensor:
    """An exponential mean that started at zero over the weight of its ``count`` terms; inf where none."""
    weight = 1 - torch.pow(decay, count.double())
    return torch.where(count > 0, mean / weight, torch.inf).to(mean.dtype)


class _MeanScore(Score):
    """Bias-corrected exponential mean (Kingma & Ba 2015, section 3) of a number per unit and step."""

    def observe(self, name: str, module: BlockSparseLayer, saliency: BlockSaliency) -> None:
        blocks, neurons = self._step(module, saliency)
        statistics = self._of(name, module)
        live = _layout(module).mask
        mean = statistics[_BLOCK]
        mean.add_(torch.where(live, blocks.to(mean.dtype) - mean, 0), alpha=1 - self.decay)
        statistics[_BLOCK_COUNT].add_(live)
        statistics[_NEURON].lerp_(neurons.to(mean.dtype), 1 - self.decay)
        statistics[_NEURON_COUNT].add_(1)

    def scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        statistics = self._of(name, module)
        return _correct_bias(statistics[_BLOCK], statistics[_BLOCK_COUNT], self.decay)

    def neuron_scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        statistics = self._of(name, module)
        return _correct_bias(statistics[_NEURON], statistics[_NEURON_COUNT], self.decay)

    @abstractmethod
    def _step(self, module: BlockSparseLayer, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        """This step's value per block and per neuron."""


class SecondMoment(_MeanScore):
    """``E[s^2]`` with the gate derivative ``s = sum_{w in u} w dL/dw``: the diagonal of the Fisher
    information of a gate on the unit (Theis et al. 2018, arXiv:1801.05787, eq. 6; Molchanov et al. 2019,
    arXiv:1906.10771, eq. 8)."""

    name = "second_moment"
    of_gates = True

    def gated(self, derivative: Tensor) -> Tensor:
        return derivative.square()

    def _step(self, module: BlockSparseLayer, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        return saliency.weight_grad.square(), saliency.neuron_weight_grad.square()


class Taylor(_MeanScore):
    """``E[sum |w dL/dw|]``, first-order Taylor (Molchanov et al. 2017, arXiv:1611.06440, eq. 7, per weight);
    for a neuron ``E|sum w dL/dw|``, which is |activation x gradient| of its pre-activation."""

    name = "taylor"
    of_gates = True

    def gated(self, derivative: Tensor) -> Tensor:
        return derivative.abs()

    def _step(self, module: BlockSparseLayer, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        return saliency.weight_grad_abs, saliency.neuron_weight_grad.abs()


class Gradient(_MeanScore):
    """``E[sum (dL/dw)^2]``: squared gradient norm (SNFS and RigL grow by its like: Evci et al. 2020)."""

    name = "gradient"

    def _step(self, module: BlockSparseLayer, saliency: BlockSaliency) -> tuple[Tensor, Tensor]:
        grad = module.values.grad
        if grad is None:
            raise ValueError("expected a layer whose values have a gradient, got None")
        own = block_saliency(grad, grad, _layout(module))
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

    def observe(self, name: str, module: BlockSparseLayer, saliency: BlockSaliency) -> None:
        statistics = self._of(name, module)
        statistics[_BLOCK].sub_(saliency.weight_grad)
        statistics[_NEURON].sub_(saliency.neuron_weight_grad)

    def scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        return self._of(name, module)[_BLOCK].clone()

    def neuron_scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        return self._of(name, module)[_NEURON].clone()


class Magnitude(Score):
    """``sum w^2`` over the mean of the layer's live units, which makes layers comparable (magnitude pruning:
    Han et al. 2015, arXiv:1506.02626); read from the weights when asked."""

    name = "magnitude"

    def observe(self, name: str, module: BlockSparseLayer, saliency: BlockSaliency) -> None:
        pass

    def scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        layout = _layout(module)
        square = block_saliency(module.values, module.values, layout).weight_square
        return _over_mean(square, layout.mask.sum())

    def neuron_scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        square = block_saliency(module.values, module.values, _layout(module)).neuron_weight_grad
        return _over_mean(square, (square > 0).sum())


def _over_mean(units: Tensor, live: Tensor) -> Tensor:
    mean = units.sum() / live.clamp(min=1)
    return units / mean.clamp(min=torch.finfo(units.dtype).tiny)


class Activation(Score):
    """Share of samples (and positions) in which an output of the layer is above zero, an exponential mean
    over training forwards: what a ReLU behind it passes (APoZ is its complement: Hu et al. 2016,
    arXiv:1607.03250). A norm between layer and ReLU is not seen. A row's blocks share its neurons' mean."""

    name = "activation"

    def __init__(self, *, seed: int = 0, decay: float = 0.99) -> None:
        super().__init__(seed=seed, decay=decay)
        self._hooks: list[Any] = []

    def attach(self, modules: Mapping[str, BlockSparseLayer]) -> None:
        for name, module in modules.items():
            _layout(module)
            self._hooks.append(module.register_forward_hook(self._hook(name)))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, name: str) -> Any:
        @torch.compiler.disable
        def hook(module: BlockSparseLayer, inputs: Any, output: Tensor) -> None:
            if module.training and torch.is_grad_enabled():
                self._take(name, module, output.detach())

        return hook

    def _take(self, name: str, module: BlockSparseLayer, output: Tensor) -> None:
        weight_dims = getattr(module, "kernel_size", ())
        channels_last = output.movedim(-1 - len(weight_dims), -1)
        statistics = self._of(name, module)
        mean, count = statistics[_NEURON], statistics[_NEURON_COUNT]
        frequency = (channels_last > 0).reshape(-1, mean.shape[0]).to(mean.dtype).mean(0)
        mean.lerp_(frequency, 1 - self.decay)
        count.add_(1)

    def observe(self, name: str, module: BlockSparseLayer, saliency: BlockSaliency) -> None:
        pass

    def scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        layout, neurons = _layout(module), self.neuron_scores(name, module)
        rows = torch.arange(layout.out_features, device=neurons.device) // layout.block[0]
        total = neurons.new_zeros(layout.rows).index_add_(0, rows, neurons)
        size = neurons.new_zeros(layout.rows).index_add_(0, rows, torch.ones_like(neurons))
        return (total / size).unsqueeze(1).expand(layout.rows, layout.columns).clone()

    def neuron_scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        statistics = self._of(name, module)
        return _correct_bias(statistics[_NEURON], statistics[_NEURON_COUNT], self.decay)


class Random(Score):
    """Uniform numbers: the baseline that any score has to beat. Drawn from the seed, the layer's name and the
    number of steps observed, so that each event draws anew and a resumed run draws the same."""

    name = "random"

    def __init__(self, *, seed: int = 0, decay: float = 0.99) -> None:
        super().__init__(seed=seed, decay=decay)
        self._steps: dict[str, int] = {}

    def observe(self, name: str, module: BlockSparseLayer, saliency: BlockSaliency) -> None:
        self._steps[name] = self._steps.get(name, 0) + 1

    def _draw(self, name: str, unit: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        key = zlib.crc32(f"{self.seed}/{unit}/{self._steps.get(name, 0)}/{name}".encode())
        return torch.rand(shape, generator=torch.Generator().manual_seed(key)).to(device)

    def scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        mask = _layout(module).mask
        return self._draw(name, _BLOCK, tuple(mask.shape), mask.device)

    def neuron_scores(self, name: str, module: BlockSparseLayer) -> Tensor:
        layout = _layout(module)
        return self._draw(name, _NEURON, (layout.out_features,), layout.mask.device)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": dict(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps = {name: int(steps) for name, steps in state["steps"].items()}


SCORES: dict[str, type[Score]] = {
    score.name: score for score in (SecondMoment, Taylor, Magnitude, Gradient, Movement, Activation, Random)
}


def make_score(name: str, *, seed: int = 0, decay: float = 0.99) -> Score:
    """A score by its name.

    Args:
        seed: of the random score.
        decay: of exponential means, per observed step.

    Raises:
        ValueError: an unknown name, or a decay outside [0, 1).
    """
    if name not in SCORES:
        raise ValueError(f"expected a score among {', '.join(sorted(SCORES))}, got {name!r}")
    return SCORES[name](seed=seed, decay=decay)
