"""Hooks on ``optimizer.step``, and what is read there: gradients as the optimizer sees them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape
from dynaprune.pruning.checks.refusals import in_backward, is_capturing
from dynaprune.pruning.observe.score import Score
from dynaprune_kernels import BlockSaliency, block_saliency

OBSERVE_SHARE = 0.02
OBSERVATIONS_PER_INTERVAL = 8
# Observations in a row after which gradients that are not finite, or all zero, are no accident.
LASTING = 8
# Nominal FLOP/s, bytes/s and seconds per small op, by device type: only their ratios decide, and they are
# constants, so that two runs observe the same steps.
_MACHINES = {"cpu": (2e11, 2e10, 5e-6), "cuda": (3e14, 2e12, 5e-6)}
_STEP_OPS, _OBSERVE_OPS, _READ_OPS = 20, 9, 12
_STEP_BYTES, _OBSERVE_BYTES = 10 * 4, 2 * 4


class StepHooks:
    """Calls ``before(optimizer)`` when gradients are ready and ``after(optimizer)`` when the step is done.

    ``before`` runs right before the update; with ``step(closure)`` after the closure, which is where backward
    is. During the capture of a CUDA graph nothing runs.

    Args:
        refuse_in_backward: raise where a step is inside backward; otherwise nothing runs there.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        before: Callable[[torch.optim.Optimizer], None],
        after: Callable[[torch.optim.Optimizer], None] | None = None,
        *,
        refuse_in_backward: bool = True,
    ) -> None:
        self._before, self._after, self._refuses = before, after, refuse_in_backward
        self._handles: list[Any] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre))
            self._handles.append(optimizer.register_step_post_hook(self._post))

    def _pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_capturing():
            return None
        if in_backward():
            if not self._refuses:
                return None
            raise RuntimeError(
                f"{type(optimizer).__name__}.step was called inside backward: pruning changes shapes after "
                "the step, which must not happen there; step after backward"
            )
        # `step` is wrapped as a function of the class, so args[0] is the optimizer itself.
        position = 1 if args and args[0] is optimizer else 0
        closure = args[position] if len(args) > position else kwargs.get("closure")
        if closure is None:
            self._before(optimizer)
            return None

        def observed() -> Any:
            loss = closure()
            self._before(optimizer)
            return loss

        if len(args) > position:
            return (*args[:position], observed, *args[position + 1 :]), kwargs
        return args, {**kwargs, "closure": observed}

    def _post(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._after is not None and not is_capturing():
            self._after(optimizer)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class RowCounter:
    """Counts the rows (tokens, or output positions) that each linear layer and convolution of ``model`` sees,
    block-sparse or plain, until :meth:`stop`.

    Under ``torch.compile`` nothing is counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, int] = {}
        shapes = ((name, layer, layer_shape(layer)) for name, layer in model.named_modules())
        self._handles = [
            layer.register_forward_hook(_CountRows(self.rows, name, shape.out))
            for name, layer, shape in shapes
            if shape is not None and shape.in_
        ]

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass
class _CountRows:
    """The hook of one layer. A copy of the layer counts into a dict of its own."""

    rows: dict[str, int]
    name: str
    width: int

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled():
            self.rows[self.name] = self.rows.get(self.name, 0) + output.numel() // self.width


def observation_period(
    layers: Mapping[str, BlockSparseLayer],
    rows: Mapping[str, int],
    interval: int,
    read: Mapping[str, nn.Parameter] | None = None,
) -> int:
    """Least k such that observing every k-th step costs at most 2% of training, by a model of the costs.

    At least eight observations per event interval are kept, at whatever cost. The model's constants are
    fixed, so two runs of the same training observe the same steps; what it really cost is measured and in the
    report.

    Args:
        rows: that each layer sees in a step.
        read: weights whose products with their gradients are summed too (readers of groups of neurons).
    """
    step = observe = 0.0
    for name, layer in layers.items():
        flops, bandwidth, call = _MACHINES.get(layer.values.device.type, _MACHINES["cuda"])
        weights = layer.values.numel()
        step += 6 * weights * rows.get(name, 0) / flops + weights * _STEP_BYTES / bandwidth + _STEP_OPS * call
        observe += weights * _OBSERVE_BYTES / bandwidth + _OBSERVE_OPS * call
    for weight in (read or {}).values():
        _, bandwidth, call = _MACHINES.get(weight.device.type, _MACHINES["cuda"])
        observe += weight.numel() * _OBSERVE_BYTES / bandwidth + _READ_OPS * call
    wanted = math.ceil(observe / (OBSERVE_SHARE * step)) if step else 1
    return max(1, min(wanted, interval // OBSERVATIONS_PER_INTERVAL))


@dataclass
class Observed:
    """What observing did so far.

    Attributes:
        observations, discarded: steps shown to the score, and steps with gradients that are not finite.
        seconds: time spent.
        layers: names of layers of which any gradient was seen.
        not_finite_in_a_row, zero_in_a_row: the latest observations of such gradients, without a scaler.
    """

    observations: int = 0
    discarded: int = 0
    seconds: float = 0.0
    layers: set[str] = field(default_factory=set)
    not_finite_in_a_row: int = 0
    zero_in_a_row: int = 0

    @property
    def trouble(self) -> str:
        """What has been wrong with the gradients for :data:`LASTING` observations; empty where nothing is."""
        if self.not_finite_in_a_row >= LASTING:
            return "not finite"
        return "all zero" if self.zero_in_a_row >= LASTING else ""


def observe(
    layers: Mapping[str, BlockSparseLayer], score: Score, optimizer: torch.optim.Optimizer, observed: Observed
) -> bool:
    """Show the score one step's gradients, and say whether: a step with any that is not finite is discarded.

    A fused optimizer under a GradScaler is called with scaled gradients, on skipped steps too: its
    ``grad_scale`` and ``found_inf`` are honoured.
    """
    started = time.perf_counter()
    scale = getattr(optimizer, "grad_scale", None)
    seen: dict[str, BlockSaliency] = {}
    for name, layer in layers.items():
        if layer.values.grad is not None:
            saliency = block_saliency(layer.values, layer.values.grad, layer.layout)
            seen[name] = saliency if scale is None else _unscaled(saliency, scale)
    if not seen:
        return False
    finite, zero = _finite_and_zero(list(seen.values()))
    if getattr(optimizer, "found_inf", None) is None:
        observed.not_finite_in_a_row = 0 if finite else observed.not_finite_in_a_row + 1
        observed.zero_in_a_row = observed.zero_in_a_row + 1 if zero else 0
    shown = finite and not is_skipped(optimizer)
    if shown:
        for name, saliency in seen.items():
            score.observe(name, layers[name], saliency)
            observed.layers.add(name)
        observed.observations += 1
    else:
        observed.discarded += 1
    observed.seconds += time.perf_counter() - started
    return shown


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer under a GradScaler is about to skip its step. Syncs where there is one."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(torch.as_tensor(found_inf).sum() != 0)


def _unscaled(saliency: BlockSaliency, scale: Any) -> BlockSaliency:
    return BlockSaliency(
        saliency.weight_square,
        saliency.grad_square / scale / scale,
        saliency.weight_grad_abs / scale,
        saliency.weight_grad / scale,
        saliency.neuron_weight_grad / scale,
    )


def _finite_and_zero(saliencies: list[BlockSaliency]) -> tuple[bool, bool]:
    """Whether all sums are finite, and whether all gradients are zero: one host sync per device."""
    device = saliencies[0].grad_square.device
    squares = torch.stack([s.grad_square.sum().to(device) for s in saliencies])
    products = torch.stack([s.weight_grad_abs.sum().to(device) for s in saliencies])
    finite, zero = torch.stack([torch.isfinite(squares + products).all(), (squares == 0).all()]).tolist()
    return finite, zero


def refuse_without_gradients(
    layers: Mapping[str, BlockSparseLayer], optimizer: torch.optim.Optimizer
) -> None:
    """Raise RuntimeError where no prunable weight of the optimizer has a gradient at its step."""
    if layers and all(layer.values.grad is None for layer in layers.values()):
        what_to_do = "call backward first, and zero_grad after the step"
        if not any(layer.values.requires_grad for layer in layers.values()):
            what_to_do = (
                "they were frozen after attach (as PEFT freezes what it adds adapters to); call "
                "pruner.finalize() before that"
            )
        raise RuntimeError(
            f"{type(optimizer).__name__}.step: expected gradients on the prunable weights, got None on all "
            f"of {', '.join(list(layers)[:4])}: {what_to_do}"
        )
