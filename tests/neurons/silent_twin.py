"""Whole neurons of plain layers, cut while they still do something, and the twin in which they are zero."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynaprune.neurons.carry_out import carry_out
from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs, tensors_in
from dynaprune.neurons.groups import NeuronGroup
from dynaprune.neurons.silence import silenced_outputs
from dynaprune.neurons.silent_cut import find_silent_cut
from tests.neurons.cutting import rounding
from tests.neurons.group_checks import run


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, as bytes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {k: t.detach().clone().reshape(-1).view(torch.uint8) for k, t in tensors.items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    assert not [name for name in before if not torch.equal(after[name], before[name])]


def silent_twin(model: nn.Module, groups: Sequence[NeuronGroup]) -> nn.Module:
    """A copy of ``model`` in which all that makes ``groups`` is zero for good."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, index in silenced_outputs(model, groups).items():
            layer: Any = twin.get_submodule(name)
            for tensor in (layer.weight, layer.bias, getattr(layer, "running_mean", None)):
                if tensor is not None:
                    tensor[index] = 0
    return twin


def cut_like_silent_twin(
    model: nn.Module, example: Any, fresh: Any, groups: Sequence[NeuronGroup]
) -> CutReport:
    """Cut ``groups``; for the example and ``fresh`` inputs outputs and gradients are the silent twin's."""
    before = bits(model)
    report = find_silent_cut(model, groups, ExampleInputs.of(example))
    assert_same_bits(model, before)
    going = [g for g in groups if not any(m.name in report.refused for m in g.producers)]
    twin = silent_twin(model, going)
    assert report.plan is not None and report.neurons
    carry_out(model, report.plan)
    for inputs in (example, fresh):
        for found, expected in zip(run(model, inputs), run(twin, inputs), strict=True):
            assert float((found - expected).abs().max()) <= rounding(expected)
    kept = {name: (~outputs, ~inputs) for name, (outputs, inputs) in report.plan.layers.items()}
    for network in (model, twin):
        network.eval()  # batch norms would divide by the batch's variance, which rounding moves
        network.zero_grad()
        outputs = ExampleInputs.of(fresh).forward(network)
        torch.stack([t.square().mean() for t in tensors_in(outputs) if t.requires_grad]).sum().backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        expected, layer = theirs[name].grad, name.rpartition(".")[0]
        assert expected is not None
        if layer in kept:
            rows, columns = kept[layer]
            expected = expected[rows]
            columns = columns if expected.dim() > 1 and columns.numel() == expected.shape[1] else None
            expected = expected if columns is None else expected[:, columns]
        assert expected.shape == parameter.grad.shape == parameter.shape
        largest = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
        bound = 256 * torch.finfo(expected.dtype).eps * largest
        assert float((parameter.grad - expected).abs().max()) <= bound, name
    return report
