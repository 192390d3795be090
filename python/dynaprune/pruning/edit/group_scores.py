"""What a group of neurons is worth to the layers that read it.

A gate on everything that the neurons of a group pass on has the derivative ``s = sum w dL/dw`` over the
columns of all their readers, block-sparse and dense. Over their producers' rows the same sum is zero where a
norm follows, whatever the neurons are worth: scaling the rows changes nothing (van Laarhoven 2017,
arXiv:1706.05350). One gate closes for all readers at once, so their sums are added with their signs before
the score squares them.

Sums need the gradients of all readers of one step. A group shows none where a reader is frozen or in no
optimizer of the pruner; :meth:`GroupScores.unseen` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynaprune.neurons.cut_plan import CutPlan
from dynaprune.neurons.groups import NeuronGroup, NeuronMap
from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.edit.input_gates import input_gates


class Gates(Protocol):
    """What a score says of the gates that it is made of; see ``dynaprune.Score``."""

    of_gates: bool
    accumulates: bool
    decay: float

    def gated(self, derivative: Tensor) -> Tensor:
        """What gates with these derivatives count in one step."""


_VALUE, _COUNT = "value", "count"


@dataclass(frozen=True)
class _Reader:
    """Inputs of one layer that belong to groups: int64 ``[k]`` each, with the number of the group."""

    name: str
    owner: int
    width: int
    inputs: Tensor
    group: Tensor


@dataclass
class _Watched:
    """The groups of one map, and the statistics of each: ``value`` and ``count`` float ``[groups]``.

    ``parts``: sums of step number ``step`` by the optimizer that holds the readers, until all are there.
    """

    neuron_map: NeuronMap
    groups: list[NeuronGroup]
    readers: list[_Reader]
    reasons: dict[int, str]
    value: Tensor
    count: Tensor
    step: int = 0
    parts: dict[int, Tensor] = field(default_factory=dict)


class GroupScores:
    """Statistics of every group of neurons, made of its readers' gradients at each observed step.

    They survive a change of the groups (a cut, a resumed training) as figures of the neurons of the layer
    that a group is named after.
    """

    def __init__(self) -> None:
        self._saved: dict[str, dict[str, Tensor]] = {}
        self._watched: _Watched | None = None

    def waiting(self, step: int) -> bool:
        """Whether some gradients of this step were seen, and others not yet."""
        return self._watched is not None and self._watched.step == step and bool(self._watched.parts)

    def drop_parts(self) -> None:
        """Forget what was seen of an unfinished step."""
        if self._watched is not None:
            self._watched.parts.clear()

    def watch(
        self, model: nn.Module, neuron_map: NeuronMap, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Observe the groups of ``neuron_map`` from now on; nothing happens where it is watched already."""
        if self._watched is not None and self._watched.neuron_map is neuron_map:
            return
        self._saved, groups = self._by_neuron(), neuron_map.groups
        holder = {
            id(p): number
            for number, each in enumerate(optimizers)
            for group in each.param_groups
            for p in group["params"]
        }
        members: dict[str, list[tuple[int, Tensor]]] = {}
        reasons: dict[int, str] = {}
        names = {member.name for group in groups for member in group.readers}
        unreadable = {n: _cannot_see(n, _weight(model.get_submodule(n)), holder) for n in names}
        for number, group in enumerate(groups):
            for member in group.readers:
                if reason := unreadable[member.name]:
                    reasons.setdefault(number, reason)
                members.setdefault(member.name, []).append((number, member.index))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        readers = []
        for name, parts in members.items():
            seen = [(number, index) for number, index in parts if number not in reasons]
            if not seen:
                continue
            weight = _weight(model.get_submodule(name))
            assert weight is not None
            inputs = torch.cat([index for _, index in seen]).to(device)
            numbers = torch.cat([torch.full_like(index, number) for number, index in seen]).to(device)
            readers.append(_Reader(name, holder[id(weight)], neuron_map.widths[name][1], inputs, numbers))
        value, count = self._of_groups(groups, neuron_map.widths)
        self._watched = _Watched(neuron_map, groups, readers, reasons, value.to(device), count.to(device))

    def stop(self) -> None:
        """The groups are about to change, or have: keep the neurons' figures only."""
        self._saved, self._watched = self._by_neuron(), None

    def read(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The readers' weights that :meth:`observe` goes over, by layer."""
        readers = self._watched.readers if self._watched is not None else []
        weights = {r.name: _weight(model.get_submodule(r.name)) for r in readers}
        return {name: weight for name, weight in weights.items() if weight is not None}

    @torch.no_grad()
    def observe(self, model: nn.Module, owner: int, score: Gates, *, step: int, scale: Any = None) -> None:
        """Take in the gradients of the readers that optimizer number ``owner`` holds, right before its step.

        The statistics move when those of all optimizers are there; an earlier step that lacks some is
        dropped. A group with a gradient that is missing or not finite is left out of this step. No host sync.

        Args:
            step: number of the step that the gradients belong to.
            scale: what the gradients are multiplied by (a fused optimizer under a GradScaler).
        """
        watched = self._watched
        if watched is None or not score.of_gates or not any(r.owner == owner for r in watched.readers):
            return
        if watched.step != step:
            watched.step = step
            watched.parts.clear()
        total = torch.zeros_like(watched.value)
        for reader in watched.readers:
            if reader.owner == owner:
                gates = input_gates(model.get_submodule(reader.name))
                if gates is None or gates.numel() != reader.width:
                    total[reader.group] = torch.nan
                else:
                    gates = gates.to(total.device, total.dtype)
                    total.index_add_(0, reader.group, gates[reader.inputs])
        watched.parts[owner] = total if scale is None else total / torch.as_tensor(scale).to(total.device)
        if len(watched.parts) < len({r.owner for r in watched.readers}):
            return
        figure = score.gated(torch.stack(list(watched.parts.values())).sum(0))
        watched.parts.clear()
        seen = torch.isfinite(figure)
        if score.accumulates:
            watched.value.add_(torch.where(seen, figure, 0))
        else:
            watched.value.add_(torch.where(seen, figure - watched.value, 0), alpha=1 - score.decay)
        watched.count.add_(seen)

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept, by group or by neuron."""
        for figures in self._saved.values():
            yield from figures.values()
        if (watched := self._watched) is not None:
            yield from (watched.value, watched.count, *watched.parts.values())
            for reader in watched.readers:
                yield from (reader.inputs, reader.group)

    def scores(self, score: Gates) -> list[float | None]:
        """One figure per group of the map, higher = keep; None of one that was never seen. Syncs."""
        if self._watched is None:
            return []
        value, count = self._watched.value.double().cpu(), self._watched.count.double().cpu()
        if not score.accumulates:
            value = value / (1 - torch.pow(score.decay, count))
        return [
            v if c > 0 and number not in self._watched.reasons else None
            for number, (v, c) in enumerate(zip(value.tolist(), count.tolist(), strict=True))
        ]

    def closed(self) -> dict[int, str]:
        """Numbers of the groups of the map that can never show a sum, with the reason."""
        return {} if self._watched is None else dict(self._watched.reasons)

    def unseen(self) -> dict[str, str]:
        """Why groups show no sum, by the layer that they are named after."""
        if self._watched is None:
            return {}
        groups, reasons = self._watched.groups, dict(self._watched.reasons)
        for number in (self._watched.count == 0).nonzero().squeeze(1).tolist():
            reasons.setdefault(number, "at no observed step did all that read them have a finite gradient")
        return {groups[number].name: reason for number, reason in reasons.items()}

    def cut(self, plan: CutPlan) -> None:
        """Follow a cut of neurons, in the numbering before; a new map has to be watched afterwards."""
        self.stop()
        for name, figures in self._saved.items():
            if name in plan.layers:
                stay = ~plan.layers[name][0]
                for key, tensor in figures.items():
                    if tensor.shape == stay.shape:
                        figures[key] = tensor[stay]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By layer ``value`` and ``count``, float ``[out]`` on the CPU: copies."""
        return {name: {k: t.clone() for k, t in s.items()} for name, s in self._by_neuron().items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from a saved state; an empty one starts afresh."""
        self._watched = None
        self._saved = {name: {k: t.clone() for k, t in s.items()} for name, s in state.items()}

    def _by_neuron(self) -> dict[str, dict[str, Tensor]]:
        watched = self._watched
        if watched is None:
            return self._saved
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in ((_VALUE, watched.value.cpu()), (_COUNT, watched.count.cpu())):
            for name, (neurons, numbers) in _neurons(watched.groups).items():
                figures = tensor.new_zeros(watched.neuron_map.widths[name][0])
                found.setdefault(name, {})[key] = figures.index_copy_(0, neurons, tensor[numbers])
        return found

    def _of_groups(
        self, groups: list[NeuronGroup], widths: Mapping[str, tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """The saved figures by group: the mean over its neurons, which is their common value as a rule."""
        total = torch.zeros(2, len(groups), dtype=torch.float64)
        size = torch.tensor([g.neurons.numel() for g in groups], dtype=torch.float64)
        for name, (neurons, numbers) in _neurons(groups).items():
            saved = self._saved.get(name)
            if saved is not None and saved[_VALUE].numel() == widths[name][0]:
                for row, key in enumerate((_VALUE, _COUNT)):
                    total[row].index_add_(0, numbers, saved[key].double()[neurons])
        value, count = (total / size).float()
        return value, count


def _neurons(groups: list[NeuronGroup]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer that groups are named after: its neurons in groups, and the numbers of the groups."""
    found: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        found.setdefault(group.name, []).append(number)
    return {
        name: (
            torch.cat([groups[n].neurons for n in numbers]),
            torch.tensor(numbers).repeat_interleave(
                torch.tensor([groups[n].neurons.numel() for n in numbers])
            ),
        )
        for name, numbers in found.items()
    }


def _weight(layer: nn.Module) -> nn.Parameter | None:
    weight = layer.values if isinstance(layer, BlockSparseLayer) else getattr(layer, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _cannot_see(name: str, weight: nn.Parameter | None, holder: Mapping[int, int]) -> str:
    if weight is None:
        return f"the weight of {name!r}, which reads them, is no Parameter"
    if not weight.requires_grad:
        return f"{name!r}, which reads them, is frozen"
    return "" if id(weight) in holder else f"no optimizer of the pruner holds {name!r}, which reads them"
