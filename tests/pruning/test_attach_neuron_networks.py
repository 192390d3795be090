"""Whole neurons of convolutions, residual streams and transformers, cut out while they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune import PruningConfig
from dynaprune.experiment.tasks.resnet import CifarResNet
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.shape import layer_shape
from tests.neurons.test_neuron_families import FAMILIES, transformers
from tests.neurons.test_residual_channels import images
from tests.rounding import agree

STEPS = 12


def settings(**changes: Any) -> PruningConfig:
    chosen: dict[str, Any] = {"units": "neurons", "target_sparsity": 0.5, "total_steps": STEPS, "interval": 1}
    chosen["trial_budget"] = None
    return PruningConfig(**{**chosen, **changes})


def resnet() -> Any:
    torch.manual_seed(0)
    return CifarResNet((16, 24), (2, 2), classes=3)


def widths(model: nn.Module) -> list[int]:
    return [shape.out for module in model.modules() if (shape := layer_shape(module)) is not None]


def test_channels_of_a_residual_network_go_by_trial(tmp_path: Path) -> None:
    model, (x, y) = resnet(), images(32)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def trial() -> tuple[Tensor, Tensor]:
        return nn.functional.cross_entropy(model(x), y, reduction="none"), y

    config = settings(tolerance=0.5, allowance=9.0)  # 32 samples can show no less
    pruner = dynaprune.attach(model, optimizer, config, trial=trial, example_inputs=x[:4])
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    report = pruner.report()
    assert pruner.target_reached and report["trials"]["count"] > 2 and report["removed_passed"] > 0
    assert not any(isinstance(module, BlockSparseLayer) for module in model.modules())
    first, second = model.stages
    streams = [{block.conv2.out_channels for block in stage} for stage in (first, second)]
    assert [len(widths) for widths in streams] == [1, 1]  # what is added together stays as wide
    assert second[0].downsample[0].out_channels in streams[1]
    assert sum(widths(model)) < sum(widths(resnet()))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shapes = {tuple(t.shape) for t in (module.weight, module.bias, module.running_mean)}
            assert shapes == {(module.num_features,)}
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    loaded = dynaprune.load(resnet(), dynaprune.save(model, tmp_path / "model.safetensors"))
    assert widths(loaded) == widths(model)
    assert agree(loaded.eval()(x), model.eval()(x))


KINDS = ["BertForSequenceClassification", "LlamaForCausalLM", "ViTForImageClassification"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_transformer_keeps_a_head_and_a_neuron(kind: str, tmp_path: Path) -> None:
    sizes, inputs, _ = FAMILIES[kind]

    def network() -> Any:
        torch.manual_seed(0)
        model = getattr(transformers, kind)
        return model(model.config_class(**sizes))

    model, example = network(), inputs()
    first = widths(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    config = settings(target_sparsity=0.95, floor=0.0)
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=example)
    with pytest.warns(RuntimeWarning, match="out of reach"):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(**example).logits.square().mean().backward()
            optimizer.step()
    with pytest.warns(RuntimeWarning, match="short of the target"):
        pruner.detach()
    assert {width for width, before in zip(widths(model), first, strict=True) if width != before}
    for name, module in model.named_modules():
        if name.endswith((".value", ".v_proj", ".key", ".k_proj")):
            assert module.out_features == 8, name
        if name.endswith((".intermediate.dense", ".gate_proj", ".up_proj", ".fc1")):
            assert module.out_features == 1, name
    loaded = dynaprune.load(network(), dynaprune.save(model, tmp_path / "model.safetensors"))
    assert agree(loaded.eval()(**example).logits, model.eval()(**example).logits)


def test_what_turns_out_to_fail_is_left_out_from_the_start() -> None:
    """A single head can lose no part: its code knows its size, which a trial cut shows."""
    torch.manual_seed(0)
    sizes = {**FAMILIES["BertForSequenceClassification"][0], "num_attention_heads": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    example = FAMILIES["BertForSequenceClassification"][1]()
    pruner = dynaprune.attach(model, optimizer, settings(), example_inputs=example)
    reasons = pruner.report()["neurons_refused"]
    value = next(name for name in reasons if name.endswith("self.value"))
    assert "the model does not run without them" in reasons[value]
    layers = pruner.report()["layers"]
    prunable = [name for name, line in layers.items() if not line["exempt"]]
    assert all("attention.self" not in name for name in prunable) and len(prunable) > 3
