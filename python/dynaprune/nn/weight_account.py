"""Where all the weights of a model lie, under the names of a report, and why those left whole are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dynaprune.nn.block_sparse import BlockSparseLayer

HAVE_BLOCKS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_NORM = re.compile(r"norm(\dd)?$", re.IGNORECASE)
_PARAMETRIZED = ".parametrizations."


@dataclass(frozen=True)
class HeldWeight:
    """One Parameter of a model in one place.

    Attributes:
        entry: its name in a report: its layer's name, or its own where the layer has several; empty for what
            is summed as "other": biases, parameters of norms, and other vectors.
        parameter: the Parameter.
        layer: the module that holds it.
        local: its name there.
        counted_under: the entry that counts it where it has been met before, else empty.
    """

    entry: str
    parameter: Tensor
    layer: nn.Module
    local: str
    counted_under: str = ""


def held_weights(model: nn.Module, layers: Collection[str] = ()) -> Iterator[HeldWeight]:
    """Every Parameter of ``model``, once for each module that holds it.

    ``layers`` are names of layers whose weights go under the layer's name, however many they are.
    """
    first: dict[int, str] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            owner, local = path, key
            before, parametrized, after = f".{path}".rpartition(_PARAMETRIZED)
            if parametrized:
                owner, local = before[1:], after
            layer = modules[owner]
            entry = _entry(owner, local, layer, parameter, owner in layers)
            if id(parameter) in first:
                yield HeldWeight(entry, parameter, layer, local, first[id(parameter)] or "other")
            else:
                first[id(parameter)] = entry
                yield HeldWeight(entry, parameter, layer, local)


def _entry(owner: str, local: str, layer: nn.Module, parameter: Tensor, known: bool) -> str:
    known = known or isinstance(layer, BlockSparseLayer)
    own_weight = (known or type(layer).__module__.startswith("torch.")) and local.startswith("weight")
    vector = parameter.numel() == max(parameter.shape, default=1) and not own_weight
    if parameter.dim() < 2 or vector or local == "bias" or is_norm(layer):
        return ""
    if owner and (known or local == "weight"):
        return owner
    return f"{owner}.{local}".lstrip(".")


def is_norm(layer: nn.Module) -> bool:
    """Whether the module is a norm, of torch or of another package: its type's name says so."""
    return _NORM.search(type(layer).__name__) is not None


def kind(layer: nn.Module) -> str:
    """The layer's type with the package that it comes from."""
    return f"{type(layer).__module__.split('.')[0]}'s {type(layer).__name__}"


def why_whole(held: HeldWeight) -> str:
    """Why no block can be removed from a weight that belongs to none of the layers that may be pruned."""
    layer, shape = held.layer, tuple(held.parameter.shape)
    type_ = kind(layer)
    if isinstance(layer, (nn.ParameterList, nn.ParameterDict)):
        return f"a parameter in a {type(layer).__name__}, of no layer that has a block-sparse form"
    if isinstance(layer, HAVE_BLOCKS):
        return f"{type_} is not among the types to prune"
    if held.local == "weight" or type(layer).__module__.startswith("torch."):
        return f"{type_} has no block-sparse form"
    if held.parameter.dim() == 3:
        return (
            f"{shape[0]} matrices of {shape[1]}x{shape[2]} in one parameter of {type_} (stacked experts or "
            "the like), which has no block-sparse form"
        )
    return f"a parameter of {type_} itself, which has no block-sparse form"
