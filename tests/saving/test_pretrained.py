"""``save_pretrained`` and ``from_pretrained`` of pruned models of several kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dynaprune
from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.manifest import structure_manifest
from tests.rounding import agree

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def masked_language_model() -> tuple[Any, Tensor]:
    """With a decoder tied to the embedding."""
    config = transformers.BertConfig(vocab_size=50, **SIZES)
    return transformers.BertForMaskedLM(config), torch.randint(2, 40, (3, 12))


def decoder() -> tuple[Any, Tensor]:
    """With buffers that are not saved."""
    config = transformers.LlamaConfig(vocab_size=50, **SIZES)
    return transformers.LlamaForCausalLM(config), torch.randint(2, 40, (3, 12))


def speech() -> tuple[Any, Tensor]:
    """With convolutions, a parametrized weight, and an initialisation that looks at a child's weight."""
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(
        **SIZES, **convolutions, **positions, num_feat_extract_layers=2, classifier_proj_size=16
    )
    return transformers.Wav2Vec2ForSequenceClassification(config), torch.randn(2, 800)


def prune(model: Any) -> None:
    """Block-sparse layers with a third of the blocks dead."""
    dynaprune.DynaPruneCallback(model, dynaprune.PruningConfig(block_size=8))
    for layer in model.modules():
        if isinstance(layer, BlockSparseLayer):
            layer.layout.release_(torch.rand(layer.layout.mask.shape) < 1 / 3)


@pytest.mark.parametrize("build", [masked_language_model, decoder, speech])
def test_the_function_and_the_structure_come_back(build: Any, tmp_path: Path) -> None:
    model, inputs = build()
    random = torch.get_rng_state()
    dynaprune.DynaPruneCallback(copy.deepcopy(model), dynaprune.PruningConfig(block_size=8))
    assert torch.equal(torch.get_rng_state(), random)
    prune(model)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert structure_manifest(loaded) == structure_manifest(model)
    with torch.no_grad():
        assert agree(loaded(inputs).logits, model(inputs).logits)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    twin = copy.deepcopy(loaded)
    assert twin.config.to_dict()["quantization_config"] == model.config.to_dict()["quantization_config"]
    fresh, _ = build()
    prune(fresh)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    with torch.no_grad():
        assert agree(fresh.eval()(inputs).logits, model(inputs).logits)


def test_the_loaded_model_trains(tmp_path: Path) -> None:
    model, inputs = masked_language_model()
    prune(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    loss = loaded(inputs, labels=inputs).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in loaded.parameters())
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_a_model_from_a_file_of_dynaprune_keeps_its_structure(tmp_path: Path) -> None:
    """Its block-sparse layers are there before the callback is made."""
    model, inputs = masked_language_model()
    prune(model)
    dynaprune.save(model, tmp_path / "pruned.safetensors")
    second = dynaprune.load(masked_language_model()[0], tmp_path / "pruned.safetensors").eval()
    dynaprune.DynaPruneCallback(second, dynaprune.PruningConfig(block_size=8))
    second.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert agree(loaded(inputs).logits, second(inputs).logits)


def test_a_quantized_model_is_refused() -> None:
    model, _ = masked_language_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="cannot prune a quantized model"):
        prune(model)


def test_a_foreign_structure_is_refused(tmp_path: Path) -> None:
    model, _ = masked_language_model()
    prune(model)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("layer.0.output.dense", "layer.9.output.dense"))
    with pytest.raises(ValueError, match="expected the structure of this model, got another's"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("labels", [5, 1])
def test_another_number_of_labels_is_refused(labels: int, tmp_path: Path) -> None:
    """The head would come back with the saved one's width, and the config would say another."""
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **SIZES)
    model = transformers.BertForSequenceClassification(config)
    prune(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"'classifier' has {labels} outputs here and 3 in what is loaded"):
        type(model).from_pretrained(tmp_path, num_labels=labels)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.classifier = torch.nn.Linear(32, labels)  # as the error advises
    loaded.config.num_labels = loaded.num_labels = labels
    loaded.save_pretrained(tmp_path / "task")
    again = type(model).from_pretrained(tmp_path / "task").eval()
    x = torch.randint(2, 40, (3, 12))
    with torch.no_grad():
        assert agree(again(x).logits, loaded.eval()(x).logits)
