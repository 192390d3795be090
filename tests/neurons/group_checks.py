"""Cut one group of every layer and compare the network with its twin, in which the group is only masked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.neurons.candidates import member_blocks
from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs, tensors_in
from dynaprune.neurons.groups import NeuronGroup, NeuronMap, find_groups
from dynaprune.nn import BlockSparseLayer
from tests.neurons.cutting import rounding


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that ``model`` puts out in evaluation mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = tensors_in(ExampleInputs.of(example).forward(model))
    model.train(training)
    return found


def one_of_each(neuron_map: NeuronMap) -> list[NeuronGroup]:
    """The second group of every layer that has several, else its only one."""
    by_layer: dict[str, list[NeuronGroup]] = {}
    for group in neuron_map.groups:
        by_layer.setdefault(group.name, []).append(group)
    return [groups[1 if len(groups) > 1 else 0] for groups in by_layer.values()]


def unread(model: nn.Module, group: NeuronGroup) -> None:
    """Let every block die that reads ``group``."""
    for member in group.readers:
        layer = model.get_submodule(member.name)
        assert isinstance(layer, BlockSparseLayer), f"{member.name} is plain: it is never dead"
        layer.layout.release_(member_blocks(layer, member).clone())


def silenced(model: nn.Module, group: NeuronGroup) -> None:
    """Let every block die that makes ``group``."""
    for member in group.producers:
        layer = model.get_submodule(member.name)
        assert isinstance(layer, BlockSparseLayer), f"{member.name} is plain: it is never dead"
        layer.layout.release_(member_blocks(layer, member).clone())


def cut_like_twin(
    model: nn.Module, example: Any, fresh: Any, neuron_map: NeuronMap | None = None
) -> CutReport:
    """Cut what is dead; for the example and for ``fresh`` inputs the outputs are those of the masked twin."""
    twin = copy.deepcopy(model)
    inputs = ExampleInputs.of(example)
    report = cut_dead_neurons(model, neuron_map or find_groups(model, inputs), inputs)
    for each in (example, fresh):
        for mine, other in zip(run(model, each), run(twin, each), strict=True):
            assert mine.shape == other.shape
            if other.is_floating_point():
                assert float((mine - other).abs().max()) <= rounding(other)
    return report


def sparse_readers(model: nn.Module, group: NeuronGroup) -> bool:
    """Whether all that reads ``group`` is block-sparse."""
    return all(isinstance(model.get_submodule(m.name), BlockSparseLayer) for m in group.readers)
