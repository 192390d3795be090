"""Whether a model that was cut computes what its twin, with the same neurons only masked, computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dynaprune.neurons.folding import Observation
from dynaprune.nn.shape import layer_shape

_ROUNDING = {torch.float16: 8.0, torch.bfloat16: 8.0}
_LAYER_ROUNDING = 4096.0


def watched_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose outputs are compared: all with weights that can be cut."""
    shapes = ((name, layer_shape(module)) for name, module in model.named_modules())
    return [name for name, shape in shapes if shape is not None and shape.in_]


def differs(before: Observation, after: Observation, cut: Mapping[str, Tensor]) -> str:
    """How the outputs of the model or of a layer moved by more than rounding, empty where they did not.

    Args:
        cut: bool ``[out]`` by layer: the outputs that ``after`` no longer has.
    """
    return _outputs_differ(before.outputs, after.outputs) or _layers_differ(before, after, cut)


def _outputs_differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> str:
    if [t.shape for t in before] != [t.shape for t in after]:
        return "the model's outputs change their shape"
    for old, new in zip(before, after, strict=True):
        other = ~((old == new) | (old.isnan() & new.isnan()))
        if not bool(other.any()):
            continue
        if not old.is_floating_point() or not bool((old[other].isfinite() & new[other].isfinite()).all()):
            return "the model's outputs change"
        moved = (old[other].double() - new[other].double()).abs().amax()
        largest = old[old.isfinite()].double().abs().amax()
        allowed = _ROUNDING.get(old.dtype, 256.0) * torch.finfo(old.dtype).eps * largest
        if bool(moved > allowed):
            return f"the model's outputs move by {float(moved):.2g}, rounding allows {float(allowed):.2g}"
    return ""


def _layers_differ(before: Observation, after: Observation, cut: Mapping[str, Tensor]) -> str:
    """Compare what every layer puts out on average.

    Behind a small factor (a layer scale that starts at 1e-6) a wrong cut would not reach the outputs yet.
    """
    for name, (old, eps) in before.layers.items():
        if name not in after.layers:
            return f"the model no longer calls {name!r}"
        new = after.layers[name][0]
        if name in cut:
            old = old[:, ~cut[name].to(old.device)]
        if old.shape != new.shape:
            return f"{name!r} does not keep its other outputs"
        moved, allowed = (old - new).abs().nan_to_num().amax(), _LAYER_ROUNDING * eps * old[1].amax()
        if bool(moved > allowed):
            return f"the outputs of {name!r} move by {float(moved):.2g}, rounding allows {float(allowed):.2g}"
    return ""
