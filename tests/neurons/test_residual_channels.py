"""Channels of a residual network: inside a block and along the residual stream, with batch norms around."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynaprune import recalibrate_batch_norm
from dynaprune.experiment.tasks.resnet import CifarResNet
from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import swap_layers
from tests.neurons.cutting import kill, outputs, rounding, train

BLOCK = 8
CHANNELS = (16, 24)
STREAM = {  # by stage: what writes to the residual stream, and what reads it
    0: (
        ["stages.0.0.conv2", "stages.0.1.conv2"],
        ["stages.0.0.conv1", "stages.0.1.conv1", "stages.1.0.conv1", "stages.1.0.downsample.0"],
    ),
    1: (["stages.1.0.conv2", "stages.1.1.conv2", "stages.1.0.downsample.0"], ["stages.1.1.conv1"]),
}


def images(samples: int = 24) -> tuple[Tensor, Tensor]:
    """The same uint8 ``[n, 3, 8, 8]`` always, each with more of one colour, and which colour that is."""
    labels = torch.arange(samples) % 3
    pixels = torch.randint(0, 160, (samples, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    pixels[torch.arange(samples), labels] += 90
    return pixels.to(torch.uint8), labels


def trained(steps: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.optim.Optimizer]:
    """A block-sparse residual network, two stages of two blocks, and its optimizer with its state."""
    model = CifarResNet(CHANNELS, (2, 2), classes=3).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    swap_layers(model, BLOCK)
    train(model, optimizer, *images(), steps=steps)
    return model, optimizer


def kill_stream(model: nn.Module, stage: int, block: int) -> None:
    """Let one block of channels of a stage's residual stream die in every convolution that has it."""
    writers, readers = STREAM[stage]
    for name in writers:
        kill(model, name, rows=[block])
    for name in readers:
        kill(model, name, columns=[block])


def cut(model: nn.Module, optimizers: Any = ()) -> CutReport:
    """Cut, and check that the network in evaluation mode computes what it did, on other images too."""
    x, fresh = images(8)[0], torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    before = [outputs(model, each) for each in (x, fresh)]
    example = ExampleInputs.of(x)
    report = cut_dead_neurons(model, find_groups(model, example), example, optimizers)
    for old, each in zip(before, (x, fresh), strict=True):
        assert float((outputs(model, each) - old).abs().max()) <= rounding(old)
    return report


def tensors(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, gradient, optimizer tensor and statistic, in the shape of the dense network."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            held = {"data": parameter.detach(), "grad": parameter.grad}
            held |= {k: v for k, v in optimizer.state[parameter].items() if v.dim()}
            for key, value in held.items():
                if name == "values":
                    value = module.to_dense_shape(value)
                yield f"{module_name}.{name.replace('values', 'weight')} {key}", value.clone()
        for name, buffer in module.named_buffers(recurse=False):
            if "running" in name:
                yield f"{module_name}.{name}", buffer.clone()


def test_the_network_is_the_one_it_is_called() -> None:
    assert sum(p.numel() for p in CifarResNet().parameters()) == 11_173_962
    names = [n for n, m in CifarResNet().named_modules() if isinstance(m, nn.Conv2d)]
    assert len(names) == 20 and sum("downsample" in n for n in names) == 3
    model = CifarResNet(CHANNELS, (1, 1), zero_init_residual=True)
    for block in (model.stages[0][0], model.stages[1][0]):  # type: ignore[index]
        assert not block.bn2.weight.any() and block.bn1.weight.all()


@pytest.mark.parametrize("name", ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"])
def test_channels_inside_a_block_go_with_all_that_belongs_to_them(name: str) -> None:
    model, optimizer = trained()
    kill(model, f"{name}.conv1", rows=[1])
    kill(model, f"{name}.conv2", columns=[1])
    before = dict(tensors(model, optimizer))
    parameters = list(model.parameters())
    width = model.get_submodule(f"{name}.conv1").out_channels

    assert cut(model, [optimizer]).neurons == {f"{name}.conv1": BLOCK}

    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    keep = torch.cat([torch.arange(BLOCK), torch.arange(2 * BLOCK, width)])
    after = dict(tensors(model, optimizer))
    assert after.keys() == before.keys() and f"{name}.bn1.running_var" in after
    for key, old in before.items():
        if key.startswith((f"{name}.conv1.", f"{name}.bn1.")):
            old = old[keep]
        elif key.startswith(f"{name}.conv2."):
            old = old[:, keep]
        assert torch.equal(after[key], old), key
    train(model, optimizer, *images(), steps=2)


def test_cutting_unread_channels_changes_no_later_step() -> None:
    """Cut against kept, in double precision: both networks train on to the same weights."""
    model, optimizer = trained(dtype=torch.float64)
    for name in ("stages.0.0", "stages.1.1"):
        kill(model, f"{name}.conv1", rows=[0])
        kill(model, f"{name}.conv2", columns=[0])
    kill_stream(model, 0, 1)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=2e-3)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert sum(cut(model, [optimizer]).neurons.values()) == 3 * BLOCK
    train(model, optimizer, *images(), steps=8)
    train(twin, twin_optimizer, *images(), steps=8)
    x, _ = images()
    torch.testing.assert_close(outputs(model, x), outputs(twin, x), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(model.classifier.weight, twin.classifier.weight, rtol=1e-7, atol=1e-9)


def test_channels_that_only_make_a_constant_go_when_it_is_zero_and_known() -> None:
    """A dead channel behind a batch norm is relu(bias), once the running statistics say so; a convolution
    without a bias takes no constant but 0."""
    model, optimizer = trained()
    kill(model, "stages.0.0.conv1", rows=[1])
    with torch.no_grad():
        model.stages[0][0].bn1.bias[BLOCK:].fill_(-0.1)
    assert "caught up" in cut(model).refused["stages.0.0.conv1"]

    recalibrate_batch_norm(model, [images()[0]])
    with torch.no_grad():
        model.stages[0][0].bn1.bias[-1] = 0.1
    assert "no bias to take up" in cut(model).refused["stages.0.0.conv1"]

    with torch.no_grad():
        model.stages[0][0].bn1.bias[-1] = -0.1
    assert cut(model, [optimizer]).neurons == {"stages.0.0.conv1": BLOCK}
    assert model.stages[0][0].conv2.in_channels == CHANNELS[0] - BLOCK
    train(model, optimizer, *images(), steps=2)


def test_a_stream_channel_goes_when_nothing_reads_it() -> None:
    """The stem is dense and goes on writing: the channel goes because its readers are dead."""
    model, optimizer = trained()
    kill_stream(model, 0, 1)
    assert cut(model, [optimizer]).neurons == {"conv1": BLOCK}
    left = CHANNELS[0] - BLOCK
    assert model.conv1.out_channels == model.bn1.num_features == left
    for name in STREAM[0][0]:
        assert model.get_submodule(name).out_channels == left
        assert model.get_submodule(name.replace("conv", "bn")).num_features == left
    assert [model.get_submodule(name).in_channels for name in STREAM[0][1]] == [left] * 4
    assert model.stages[0][0].conv1.out_channels == CHANNELS[0]
    train(model, optimizer, *images(), steps=2)


def test_a_stream_channel_stays_while_one_layer_writes_and_one_reads() -> None:
    model, _ = trained()
    writers, readers = STREAM[1]
    for name in writers[1:]:
        kill(model, name, rows=[2])
    for name in readers:
        kill(model, name, columns=[2])
    assert cut(model).neurons == {}
    assert model.classifier.in_features == CHANNELS[1]


def test_a_dead_stream_channel_of_the_last_stage_moves_into_the_classifier() -> None:
    """Dead in all writers, it is a constant; the dense classifier takes that into its bias."""
    model, optimizer = trained()
    kill_stream(model, 1, 2)
    recalibrate_batch_norm(model, [images()[0]])
    with torch.no_grad():
        for norm in (model.stages[1][0].bn2, model.stages[1][1].bn2):
            norm.bias[2 * BLOCK :] += 0.2
    constant = model.classifier.bias.detach().clone()
    assert cut(model, [optimizer]).neurons == {"stages.1.0.conv2": BLOCK}
    assert not torch.equal(model.classifier.bias, constant)
    left = CHANNELS[1] - BLOCK
    assert model.classifier.in_features == left and model.stages[1][1].conv1.in_channels == left
    assert model.stages[1][0].downsample[0].out_channels == left
    assert model.stages[1][0].downsample[1].num_features == left
    train(model, optimizer, *images(), steps=2)
