"""Adapters: small layers that train beside frozen ones, and the layers that they change.

Two ways to know one. PEFT's own modules are known by the package that their class, or a base of it, comes
from. Written by hand, a *low-rank pair* is an adapter: layers ``d_in -> r -> d_out`` in a row that train and
hold fewer weights than a layer ``d_in -> d_out``,

- beside a frozen layer ``d_in -> d_out`` in one module (LoRA), whatever their names; beside one that trains
  where they are named so (``lora_A``, ``lora_down``);
- or as a module of their own, ``d -> r -> d``, between frozen layers (bottleneck adapters).

A bottleneck among layers that train is none.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

_PEFT = "peft.tuners."
_SAVED_WHOLE = "peft.utils.other"
_BASES = ("base_layer", "model", "base_model", "lora_model", "original_module")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NAMED_SO = re.compile(r"(?i)(?:.*_)?lora_(?:a|b|down|up|left|right)")


@dataclass
class Adapters:
    """What of a model are adapters.

    Attributes:
        layers: adapters' layers by name, with the reason why they are not pruned.
        guessed: names among them that are known by their shapes, not by their class.
        bases: layers that an adapter changes, by name, with the reason why they keep their widths.
        kinds: how many adapters there are, by kind.
        merged: modules whose adapter is merged into the layer under it, by name.
    """

    layers: dict[str, str] = field(default_factory=dict)
    guessed: set[str] = field(default_factory=set)
    bases: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    merged: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def reason(self, name: str, *, named: bool = False) -> str:
        """Why the layer ``name`` is not pruned; empty where it is no adapter's, or a guess and ``named``."""
        return "" if named and name in self.guessed else self.layers.get(name, "")

    def described(self) -> str:
        """Kinds and numbers."""
        return ", ".join(f"{count} of {kind}" for kind, count in self.kinds.items())


def find_adapters(model: nn.Module) -> Adapters:
    """The adapters of ``model``, active or not, by the rules in the module's text."""
    found = Adapters()
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():
        kind = peft_kind(module)
        if not kind:
            continue
        own = [child for attribute, child in module._modules.items() if attribute not in _BASES and child]
        if module not in parts and "model" not in module._modules and (own or module._parameters):
            found.kinds[kind] += 1
        if "base_layer" in module._modules and getattr(module, "merged", False) is True:
            found.merged.append(name)
        parts.update(part for child in own for part in child.modules())
        for attribute, child in module._modules.items():
            for path in _layers_under(_join(name, attribute), child):
                if attribute not in _BASES:
                    found.layers.setdefault(path, _reason(kind))
                elif attribute in ("base_layer", "original_module"):
                    found.bases.setdefault(path, f"an adapter changes it ({kind})")
    _find_pairs(model, found)
    for path in found.layers:
        found.bases.pop(path, None)
    return found


def peft_kind(module: Any) -> str:
    """Which adapter of PEFT the ``module`` is, as ``PEFT's lora``; empty where it is none."""
    for base in type(module).__mro__:
        if base.__module__.startswith(_PEFT):
            return f"PEFT's {base.__module__.split('.')[2]}"
        if base.__module__ == _SAVED_WHOLE and "modules_to_save" in getattr(module, "_modules", {}):
            return "PEFT's modules_to_save"
    return ""


def _reason(kind: str) -> str:
    if kind == "PEFT's modules_to_save":
        return "PEFT saves it whole beside the adapters (modules_to_save)"
    return f"it is an adapter ({kind}), and adapters are not pruned"


def _join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def _layers_under(prefix: str, module: nn.Module | None) -> Iterator[str]:
    if module is not None:
        for path, layer in module.named_modules(prefix=prefix):
            if _widths(layer) is not None:
                yield path


def _widths(layer: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a layer with a weight matrix, None for other modules."""
    if not any(key in layer._parameters for key in ("weight", "values")):
        return None
    for inputs, outputs in (("in_features", "out_features"), ("in_channels", "out_channels")):
        widths = getattr(layer, inputs, None), getattr(layer, outputs, None)
        if all(isinstance(width, int) for width in widths):
            return widths  # type: ignore[return-value]
    return None


def _trains(layer: nn.Module) -> bool:
    """Whether its weight does; a frozen layer's bias may."""
    weight = layer._parameters.get("weight", layer._parameters.get("values"))
    return weight is not None and weight.requires_grad


@dataclass(frozen=True)
class _Near:
    """A layer under a module: its path, and how many modules that are no containers lie between."""

    path: str
    layer: nn.Module
    between: int
    widths: tuple[int, int]
    trains: bool


def _near(module: nn.Module, prefix: str, between: int = 0) -> Iterator[_Near]:
    for attribute, child in module._modules.items():
        if child is None:
            continue
        path = _join(prefix, attribute)
        widths = _widths(child)
        if widths is not None:
            yield _Near(path, child, between, widths, _trains(child))
        else:
            yield from _near(child, path, between + (not isinstance(child, _CONTAINERS)))


@dataclass(frozen=True)
class _Pair:
    """Two layers in a row that train, ``inputs -> rank -> outputs``, of low rank."""

    down: _Near
    up: _Near

    @property
    def widths(self) -> tuple[int, int]:
        return self.down.widths[0], self.up.widths[1]

    @property
    def paths(self) -> tuple[str, str]:
        return self.down.path, self.up.path

    def named_so(self) -> bool:
        """Whether both are named as an adapter's."""
        return all(any(_NAMED_SO.fullmatch(part) for part in path.split(".")) for path in self.paths)


def _find_pairs(model: nn.Module, found: Adapters) -> None:
    """Enter the low-rank pairs beside, or between, frozen layers."""
    for name, module in model.named_modules():
        if module is not model and isinstance(module, _CONTAINERS):
            continue
        near = [each for each in _near(module, name) if each.path not in found.layers]
        pairs = [pair for pair in _pairs(near) if _belongs(model, pair)]
        if not pairs:
            continue
        paired = {path for pair in pairs for path in pair.paths}
        only = all(each.path in paired for each in near if each.trains)
        frozen = [place for place, each in enumerate(near) if not each.trains]
        for pair in pairs:
            alike = [each for each in near if each.widths == pair.widths and each.path not in paired]
            beside = [each for each in alike if not each.between and (pair.named_so() or not each.trains)]
            if isinstance(module, nn.Sequential) or (module is model and not only and not pair.named_so()):
                beside = []
            inside = frozen and frozen[0] < near.index(pair.down) < frozen[-1]
            own = pair.widths[0] == pair.widths[1] and bool(frozen) and only and module is not model
            if beside or own or (pair.widths[0] == pair.widths[1] and inside):
                _enter(found, pair, beside)


def _pairs(near: list[_Near]) -> Iterator[_Pair]:
    training = [each for each in near if each.trains and each.between <= 1]
    for one, other in pairwise(training):
        for down, up in ((one, other), (other, one)):
            (inputs, rank), (taken, outputs) = down.widths, up.widths
            if rank == taken and rank * (inputs + outputs) < inputs * outputs:
                yield _Pair(down, up)


def _belongs(model: nn.Module, pair: _Pair) -> bool:
    """Whether nothing else runs with both in one ``nn.Sequential``."""
    shared = []
    for one, other in zip(*(path.split(".") for path in pair.paths), strict=False):
        if one != other:
            break
        shared.append(one)
    holder = model.get_submodule(".".join(shared))
    return not isinstance(holder, nn.Sequential) or len(list(_near(holder, ""))) == 2


def _enter(found: Adapters, pair: _Pair, beside: list[_Near]) -> None:
    kind = "a low-rank pair beside a layer" if beside else "a bottleneck between frozen layers"
    reason = (
        f"it looks like an adapter ({kind}), and adapters are not pruned; if it is none, name it in include"
    )
    if pair.down.path not in found.layers:
        found.kinds[kind] += 1
    for path in pair.paths:
        found.layers.setdefault(path, reason)
        found.guessed.add(path)
    for each in beside:
        found.bases.setdefault(each.path, f"an adapter changes it ({kind})")


def merging_adapter(layer: object) -> str:
    """Type of an adapter over ``layer`` whose method, or a function of it, is running; empty for others.

    What runs is the innermost frame outside of torch and dynaprune; its arguments are looked at.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "dynaprune"):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    for value in [frame.f_locals.get(name) for name in arguments]:
        if isinstance(value, nn.Module) and _is_over(value, layer):
            return type(value).__name__
    return ""


def _is_over(module: nn.Module, layer: object) -> bool:
    if peft_kind(module):
        return any(each is layer for each in module.modules())
    if not any(child is layer for child in module._modules.values()):
        return False
    near = [each for each in _near(module, "") if each.layer is not layer]
    return any(pair.widths == _widths(layer) for pair in _pairs(near))
