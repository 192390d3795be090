"""Feed-forward neurons and heads of transformers' own networks, cut and compared with the masked twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import swap_layers
from tests.neurons.group_checks import cut_like_twin, one_of_each, sparse_readers, unread

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BLOCK = 8
TEXT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
)
SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
STAGES = dict(num_stages=2, hidden_sizes=[16, 32], depths=[2, 2])
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
WIDE = dict(
    vocab_size=99,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
)


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (2, 9))}


def padded() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return {**tokens(), "attention_mask": mask}


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def pairs() -> dict[str, Any]:
    return {**tokens(), "decoder_input_ids": torch.randint(3, 99, (2, 5))}


# model, its configuration, its inputs, and per kind of group: the ends of the names of the layers it touches
GATED = {"gate_proj": {"gate_proj", "up_proj", "down_proj"}}
HEADS = {"v_proj": {"v_proj", "q_proj", "k_proj", "o_proj"}}
BERT = {"intermediate.dense": {"intermediate.dense", "output.dense"}}
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], dict[str, set[str]]]] = {
    "LlamaForCausalLM": (GROUPED, padded, {**GATED, **HEADS}),
    "Qwen2ForCausalLM": (GROUPED, tokens, {**GATED, **HEADS}),
    "Qwen3ForCausalLM": ({**GROUPED, "head_dim": 8}, tokens, {**GATED, **HEADS}),
    "MistralForCausalLM": (GROUPED, tokens, {**GATED, **HEADS}),
    "MixtralForCausalLM": ({**GROUPED, "num_local_experts": 4}, tokens, HEADS),
    "GPTNeoXForCausalLM": (TEXT, tokens, {"dense_h_to_4h": {"dense_h_to_4h", "dense_4h_to_h"}}),
    "BertForSequenceClassification": (
        TEXT,
        padded,
        {**BERT, "self.value": {"query", "key", "value", "output.dense"}},
    ),
    "AlbertForSequenceClassification": (
        {**TEXT, "embedding_size": 32},
        tokens,
        {"ffn": {"ffn", "ffn_output"}},
    ),
    "T5ForConditionalGeneration": (
        {**T5, "feed_forward_proj": "gated-gelu"},
        pairs,
        {"DenseReluDense.wi_0": {"wi_0", "wi_1", "wo"}},
    ),
    "BartForConditionalGeneration": (WIDE, pairs, {"fc1": {"fc1", "fc2"}}),
    "ViTForImageClassification": (IMAGE, pixels, {"fc1": {"fc1", "fc2"}}),
    "BeitForImageClassification": (
        {**IMAGE, "use_relative_position_bias": True},
        pixels,
        {"fc1": {"fc1", "fc2"}},
    ),
    "SwinForImageClassification": (SWIN, pixels, {"mlp.fc1": {"fc1", "fc2"}}),
    "Swinv2ForImageClassification": (SWIN, pixels, BERT),
    "ConvNextForImageClassification": (STAGES, pixels, {"pwconv1": {"pwconv1", "pwconv2"}}),
    "ResNetForImageClassification": (
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
        pixels,
        {"layer.0.convolution": {"convolution", "normalization"}},
    ),
}


def network(kind: str, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model = model(model.config_class(**settings)).train()
    for parameter in model.parameters():
        if float(parameter.detach().abs().max()) < 1e-4:
            nn.init.normal_(parameter, std=0.3)  # zero biases and layer scales of 1e-6 would hide mistakes
    swap_layers(model, BLOCK)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_group_of_each_layer_goes_and_the_outputs_stay(kind: str) -> None:
    settings, inputs, expected = FAMILIES[kind]
    example, fresh = inputs(), inputs()
    model = network(kind, settings)
    found = find_groups(model, ExampleInputs.of(example))
    chosen = [group for group in one_of_each(found) if sparse_readers(model, group)]
    for end, touched in expected.items():
        groups = [group for group in chosen if group.name.endswith(end)]
        assert groups, (end, found.refused)
        for group in groups:
            for member in group.members:
                assert member.name.endswith(tuple(touched)), group
            assert all(any(m.name.endswith(t) for m in group.members) for t in touched), group
    for group in chosen:
        unread(model, group)
    report = cut_like_twin(model, example, fresh, found)
    for end in expected:
        assert sum(n for name, n in report.neurons.items() if name.endswith(end)) >= BLOCK, report.refused
    outputs = model(**fresh)
    outputs[0].float().sum().backward()


def test_what_mixtral_gave_up_on_is_said() -> None:
    settings, inputs, _ = FAMILIES["MixtralForCausalLM"]
    found = find_groups(network("MixtralForCausalLM", settings), ExampleInputs.of(inputs()))
    assert set(found.unknown.values()) <= {"model.layers.0.mlp.experts"}
    assert found.groups


def test_grouped_queries_go_with_their_key_and_value() -> None:
    model = network("LlamaForCausalLM", GROUPED)
    groups = find_groups(model, ExampleInputs.of(tokens())).of("model.layers.0.self_attn.v_proj")
    size = 8
    for number, group in enumerate(groups):
        index = {(m.name.rpartition(".")[2], m.outputs): m.index.tolist() for m in group.members}
        assert (
            index["v_proj", True] == index["k_proj", True] == list(range(number * size, (number + 1) * size))
        )
        assert index["q_proj", True] == index["o_proj", False]
        assert index["q_proj", True] == list(range(2 * number * size, 2 * (number + 1) * size))
        assert {m.name.rpartition(".")[2] for m in group.members if m.along} == {"q_proj", "k_proj"}
        assert group.averaged and not group.scaled
    assert len(groups) == 2
