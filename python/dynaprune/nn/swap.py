"""Swap a model's dense layers for block-sparse ones by rule, and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from dynaprune.nn.adapters import Adapters, find_adapters
from dynaprune.nn.block_sparse import BlockSparseLayer
from dynaprune.nn.conv import BlockSparseConv1d, BlockSparseConv2d
from dynaprune.nn.linear import BlockSparseLinear
from dynaprune.nn.own_behaviour import own_behaviour, weights_in_functions
from dynaprune.nn.weight_account import held_weights, kind
from dynaprune_kernels.geometry import check_block, padding_ratio

SPARSE_TYPES: dict[type[nn.Module], Any] = {
    nn.Linear: BlockSparseLinear,
    nn.Conv2d: BlockSparseConv2d,
    nn.Conv1d: BlockSparseConv1d,
}
_FUNCTIONALLY_READ = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
MAX_PADDING = 1.25
FROZEN = "it is frozen"
_FEW = 4


@dataclass(frozen=True)
class SwapEntry:
    """What happened to one candidate layer: ``reason`` is empty where it was swapped."""

    name: str
    reason: str

    @property
    def swapped(self) -> bool:
        return not self.reason


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module name is in ``patterns``: a name, a parent's name, or ``re:`` and an expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.fullmatch(pattern[3:], name):
                return True
        elif name == pattern or name.startswith(f"{pattern}."):
            return True
    return False


def swap_layers(
    model: nn.Module,
    block_size: int | tuple[int, int],
    *,
    types: Sequence[type[nn.Module]] = (nn.Linear, nn.Conv2d, nn.Conv1d),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    exempt: Mapping[str, str] | None = None,
) -> list[SwapEntry]:
    """Turn the layers of ``model`` that :func:`choose_layers` finds into block-sparse ones, all blocks live.

    Each layer stays the same object, with its hooks and attributes; only its class changes.

    Returns:
        One entry per candidate, with the reason where it stayed dense.

    Raises:
        TypeError, ValueError: as :func:`choose_layers`.
    """
    entries = choose_layers(model, block_size, types=types, include=include, exclude=exclude, exempt=exempt)
    for entry in entries:
        if entry.swapped:
            swap_layer(model, entry.name, block_size)
    return entries


def swap_layer(
    model: nn.Module, name: str, block_size: int | tuple[int, int], mask: Tensor | None = None
) -> BlockSparseLayer:
    """Turn one dense layer into a block-sparse one, with the live blocks of ``mask`` (all by default)."""
    module = model.get_submodule(name)
    layer: BlockSparseLayer = SPARSE_TYPES[type(module)].from_dense(module, block_size, mask=mask)
    layer.reads.name = name
    return layer


def choose_layers(
    model: nn.Module,
    block_size: int | tuple[int, int],
    *,
    types: Sequence[type[nn.Module]] = (nn.Linear, nn.Conv2d, nn.Conv1d),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    exempt: Mapping[str, str] | None = None,
) -> list[SwapEntry]:
    """Say which dense layers of ``model`` may become block-sparse; changes nothing.

    The first convolution, the classifier (the last Linear) and layers that would store over 25% of padding
    stay dense unless ``include`` names them; weights that something else reads, and adapters
    (``dynaprune.nn.adapters``), stay dense always.

    Args:
        block_size: outputs and inputs per block, 8 to 128.
        types: which layer types to swap.
        include: names, parents' names or ``re:`` patterns; everything by default.
        exclude: likewise; wins over ``include``.
        exempt: further layers that cannot be swapped, by name, with the reason.

    Returns:
        One entry per candidate, with the reason where it stays dense.

    Raises:
        TypeError, ValueError: a type that has no block-sparse form, a pattern that matches nothing, a layer
            asked for by its full name that cannot be swapped, a model in which nothing can be.
    """
    block = check_block(block_size)
    for type_ in types:
        if type_ not in SPARSE_TYPES:
            raise TypeError(f"expected types among {[t.__name__ for t in SPARSE_TYPES]}, got {type_!r}")
    candidates = [item for item in model.named_modules() if isinstance(item[1], tuple(types))]
    for pattern in [*(include or ()), *exclude]:
        if not any(matches(name, [pattern]) for name, _ in model.named_modules()):
            raise ValueError(f"expected a pattern that matches a module of the model, got {pattern!r}")

    adapters = find_adapters(model)
    spared = _spared_by_default([item for item in candidates if item[0] not in adapters.layers])
    readers = {**(exempt or {}), **dict(_outside_readers(model))}
    entries: list[SwapEntry] = []
    for name, module in candidates:
        named = include is not None and name in include
        if matches(name, exclude):
            reason = "excluded by name"
        elif include is not None and not matches(name, include):
            reason = "not among the included names"
        elif include is None and name in spared:
            reason = spared[name]
        elif why := (
            adapters.reason(name, named=named) or readers.get(name) or _cannot_swap(module, block, named)
        ):
            if named:
                raise ValueError(f"layer {name!r} was asked for by name but cannot be block-sparse: {why}")
            reason = why
        else:
            reason = ""
        entries.append(SwapEntry(name, reason))
    chosen = any(entry.swapped for entry in entries)
    if not chosen and adapters:
        raise ValueError(_nothing_but_adapters(model, adapters, dict(candidates), entries))
    if not chosen:
        raise ValueError(
            "expected a model with at least one prunable layer, got none: "
            + "; ".join(
                [
                    *_unsupported(model),
                    _by_reason({e.name: e.reason for e in entries}) or f"no layer of type {_names(types)}",
                ]
            )
        )
    return entries


def _by_reason(reasons: Mapping[str, str]) -> str:
    """Layers with the reason, few by name, many of one reason by their number and the first."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    told = [
        f"{len(names)} layers ({names[0]}, ..., {names[-1]}): {reason}"
        if len(names) > _FEW
        else "; ".join(f"{name}: {reason}" for name in names)
        for reason, names in groups.items()
    ]
    return "; ".join(told)


def _nothing_but_adapters(
    model: nn.Module, adapters: Adapters, candidates: Mapping[str, nn.Module], entries: Sequence[SwapEntry]
) -> str:
    rest = {entry.name: entry.reason for entry in entries if entry.name not in adapters.layers}
    frozen = [candidates[name].weight for name, reason in rest.items() if reason == FROZEN]
    weights = sum(weight.numel() for weight in frozen if isinstance(weight, Tensor))
    others = _by_reason({name: reason for name, reason in rest.items() if reason != FROZEN})
    others = "; ".join(filter(None, [*_unsupported(model), others]))
    return (
        f"cannot prune this model: adapters ({adapters.described()}) are never pruned, and of the "
        f"{len(rest)} other layers {len(frozen)} are frozen ({weights:,} weights)"
        f"{f' and the rest stays dense ({others})' if others else ''}. A frozen network is not pruned under "
        "its adapters: train the network itself (requires_grad_(True), its weights in the optimizer), or "
        "merge the adapters into it first (PEFT's merge_and_unload()). To adapt a pruned network, prune it "
        "first, and add adapters after finalize()"
    )


def swap_back(model: nn.Module) -> nn.Module:
    """Turn every block-sparse layer into the plain layer of the same function, in place; returns the model.

    Gradients come along; optimizer state has to be moved by whoever owns it (the pruner's ``finalize`` does).
    """
    for module in [m for m in model.modules() if isinstance(m, BlockSparseLayer)]:
        module.to_dense()
    return model


def _unsupported(model: nn.Module) -> list[str]:
    """What else has matrices, by type: layers that have no block-sparse form."""
    holders = {
        id(held.layer): held.layer
        for held in held_weights(model)
        if held.entry and not isinstance(held.layer, (*SPARSE_TYPES, nn.Embedding, BlockSparseLayer))
    }
    found = Counter(kind(layer) for layer in holders.values())
    return [f"{count} layers of type {name} have no block-sparse form" for name, count in found.items()]


def _names(types: Sequence[type[nn.Module]]) -> str:
    return ", ".join(t.__name__ for t in types)


def _spared_by_default(candidates: list[tuple[str, nn.Module]]) -> dict[str, str]:
    spared = {}
    convs = [name for name, m in candidates if isinstance(m, (nn.Conv1d, nn.Conv2d))]
    linears = [name for name, m in candidates if isinstance(m, nn.Linear)]
    if convs:
        spared[convs[0]] = "the first convolution stays dense unless named"
    if linears:
        spared[linears[-1]] = "the classifier (the last Linear) stays dense unless named"
    return spared


def _outside_readers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers whose weight something other than their own forward reads, with the reason."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    held = dict(weights_in_functions(model))
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    for name, module in model.named_modules():
        if module is model:
            yield name, "it is the model itself: wrap it in a module"
        if isinstance(module, _FUNCTIONALLY_READ):
            for child, _ in module.named_modules(prefix=name):
                yield child, f"its weight is read by {type(module).__name__} directly"
        if not isinstance(module, tuple(SPARSE_TYPES)):
            continue
        weight = getattr(module, "_parameters", {}).get("weight")
        if isinstance(weight, nn.Parameter) and uses[id(weight)] > len(paths[id(module)]):
            yield name, "its weight is tied to another module"
        if id(weight) in held:
            yield name, f"its weight is held by a function at {held[id(weight)]}"


def _cannot_swap(module: nn.Module, block: tuple[int, int], named: bool) -> str | None:
    if parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        return "its weight is parametrized (weight norm, spectral norm or the like)"
    weight = module.weight
    if isinstance(weight, UninitializedParameter):
        return "it is lazy: run a forward pass first"
    if type(module) not in SPARSE_TYPES:
        return f"{type(module).__name__} is a subclass with behaviour of its own"
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a Parameter"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data if type(weight) is nn.Parameter else weight).__name__}"
    if reason := own_behaviour(module, SPARSE_TYPES[type(module)]):
        return reason
    if not weight.requires_grad:
        return FROZEN
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        outputs, inputs = module.out_channels, module.in_channels // module.groups
        if module.groups > 1 and (outputs // module.groups) % block[0]:
            return (
                f"out_channels / groups = {outputs // module.groups} is no multiple of the block's {block[0]}"
            )
    else:
        outputs, inputs = weight.shape[0], weight.shape[1]
    ratio = padding_ratio(outputs, inputs, block)
    if ratio > MAX_PADDING and not named:
        return (
            f"blocks of {block[0]}x{block[1]} would store {ratio - 1:.0%} of padding for {outputs}x{inputs}"
        )
    return None
