"""Layers whose outputs go straight into a norm, which takes away whatever scale their weights have."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.nn.calibration_mode import calibration_mode
from dynaprune.nn.shape import NORMS
from dynaprune.nn.weight_account import is_norm

_SEED = 0


def norms_behind(model: nn.Module, layers: Collection[str], example: ExampleInputs | None) -> set[str]:
    """The names among ``layers`` whose output is the input of a norm, with nothing in between.

    With an example the model is run on it. Without one, or where it does not run, a layer counts whose next
    sibling, in the order in which its parent registers them, is a batch, instance or group norm of as many
    channels as the layer has outputs: layer norms often stand behind a sum instead.
    """
    if example is not None and (found := _seen(model, layers, example)) is not None:
        return found
    return {name for name in layers if _next_is_norm(model, name)}


def _seen(model: nn.Module, layers: Collection[str], example: ExampleInputs) -> set[str] | None:
    outputs: dict[int, tuple[str, Tensor]] = {}
    found: set[str] = set()

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[id(output)] = name, output

        return hook

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in outputs:
            found.add(outputs[id(args[0])][0])

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    handles += [module.register_forward_pre_hook(look) for module in model.modules() if is_norm(module)]
    try:
        with calibration_mode(model, _SEED):
            example.forward(model)
    except Exception:  # a model that does not run on its example is compared at the first batch
        return None
    finally:
        for handle in handles:
            handle.remove()
    return found


def _next_is_norm(model: nn.Module, name: str) -> bool:
    parent, _, own = name.rpartition(".")
    siblings = list(model.get_submodule(parent)._modules.items())
    place = [key for key, _ in siblings].index(own)
    behind = siblings[place + 1][1] if place + 1 < len(siblings) else None
    layer: Any = siblings[place][1]
    outputs = layer.layout.out_features
    if isinstance(behind, nn.GroupNorm):
        return behind.num_channels == outputs
    return isinstance(behind, NORMS) and behind.num_features == outputs
