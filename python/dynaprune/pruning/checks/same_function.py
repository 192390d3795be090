"""Whether a model computes the same after its layers were swapped, and where it parts if not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.neurons.example_inputs import ExampleInputs, tensors_in
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.pruning.checks.weight_readers import watched_reads

_SEED = 0


class Calls:
    """What one forward pass computed: the model's floating outputs, and with layers each call's output."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.of_layers: list[tuple[str, Tensor]] = []


def run(model: nn.Module, example: ExampleInputs, layers: Mapping[str, nn.Module] | None = None) -> Calls:
    """One forward pass in ``calibration_mode``, with equal draws each time.

    Args:
        layers: by name, whose outputs are kept too.

    Raises:
        ValueError: the model does not run on the example.
    """
    calls = Calls()
    handles = [each.register_forward_hook(_keep(name, calls)) for name, each in (layers or {}).items()]
    try:
        with calibration_mode(model, _SEED):
            result = _forward(model, example)
        calls.outputs = [t.detach() for t in tensors_in(result) if t.is_floating_point()]
    finally:
        for handle in handles:
            handle.remove()
    return calls


def run_if_possible(model: nn.Module, example: ExampleInputs) -> Calls | None:
    """:func:`run`, None where the model does not run on the example."""
    try:
        return run(model, example)
    except ValueError:
        return None


def weight_readers(
    model: nn.Module, example: ExampleInputs, layers: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Reasons by name of the plain ``layers`` whose weight other code reads in a forward pass.

    Raises:
        ValueError: the model does not run on the example.
    """
    with calibration_mode(model, _SEED), watched_reads(model, layers) as readers:
        _forward(model, example)
    return readers


def _forward(model: nn.Module, example: ExampleInputs) -> Any:
    try:
        return example.forward(model)
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example inputs: {type(error).__name__}: {error}"
        ) from error


def refuse_other_function(
    model: nn.Module, example: ExampleInputs, layers: Mapping[str, BlockSparseLayer], plain: Calls
) -> None:
    """Raise where the model computes something else than it did with plain layers.

    Args:
        layers: that were swapped. plain: what the model computed before.

    Raises:
        ValueError: naming the layer at which they part.
    """
    try:
        moved = differs(plain.outputs, run(model, example).outputs, model)
    except ValueError as error:
        moved = str(error)
    if not moved:
        return
    with as_dense(layers):
        again = run(model, example, layers)
        if differs(plain.outputs, again.outputs, model):
            warnings.warn(
                "the model's outputs differ from call to call, so it was not checked whether they stay what "
                "they were when layers become block-sparse",
                RuntimeWarning,
                stacklevel=2,
            )
            return
    try:
        where = parting(again, run(model, example, layers), model)
    except ValueError as error:
        where = str(error)
    raise ValueError(
        f"cannot prune this model: with block-sparse layers its outputs move {moved}; "
        f"{where or 'no layer differs, so code between the layers asks what they are'}. Exclude the layer "
        "(PruningConfig(exclude=[...])); the model and the optimizer are as they were"
    )


def _keep(name: str, calls: Calls) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            calls.of_layers.append((name, output.detach().clone()))

    return hook


def differs(before: Iterable[Tensor], after: Iterable[Tensor], model: nn.Module) -> str:
    """By how much outputs moved beyond half the digits of their dtype, empty where they did not.

    Outputs of another shape or number cannot be compared (a detector's boxes, say), and are not.
    """
    before, after = list(before), list(after)
    if len(before) != len(after):
        return ""
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or old.numel() == 0:
            continue
        usable = old.isfinite()
        if not bool(usable.any()):
            continue
        scale = float(old[usable].double().abs().max())
        moved = float((old[usable].double() - new[usable].double()).abs().max())
        allowed = _resolution(model, old) ** 0.5 * scale
        if not moved <= allowed:
            return f"by {moved:.3g}, where rounding allows {allowed:.3g}"
    return ""


def _resolution(model: nn.Module, output: Tensor) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {output.dtype}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return max(eps, 2.0**-11) if output.is_cuda and eps > 1e-10 else eps


def parting(one: Calls, other: Calls, model: nn.Module) -> str:
    """The first layer, in order of calls, at which two passes differ; empty where none does."""
    for (name, old), (other_name, new) in zip(one.of_layers, other.of_layers, strict=False):
        if name != other_name:
            return f"{name!r} is called before, and {other_name!r} in its place after"
        if old.shape != new.shape:
            return f"the outputs of {name!r} have shape {tuple(old.shape)} before, {tuple(new.shape)} after"
        if moved := differs([old], [new], model):
            return f"the outputs of {name!r} move {moved}"
    missing = [name for name, _ in one.of_layers[len(other.of_layers) :]]
    extra = [name for name, _ in other.of_layers[len(one.of_layers) :]]
    if missing or extra:
        return f"{(missing or extra)[0]!r} is called {'before' if missing else 'after'} only"
    return ""


@contextmanager
def as_dense(layers: Mapping[str, BlockSparseLayer]) -> Any:
    """Inside, block-sparse layers are the plain layers of the same function; nothing of them is changed.

    Yields:
        None; parameters named ``values`` are ``weight`` meanwhile, tensors of their own.
    """
    kept = []
    try:
        for layer in layers.values():
            weight = nn.Parameter(layer.to_dense_shape(layer.values), layer.values.requires_grad)
            kept.append((layer, type(layer), dict(layer.__dict__)))
            layer.turn_plain_(weight)
        yield
    finally:
        for layer, type_, attributes in reversed(kept):
            layer.__class__ = type_
            training = layer.training
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            layer.training = training
