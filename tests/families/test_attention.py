"""Cutting attention heads: outputs stay, state is sliced alike, counts follow, checkpoints restore them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynaprune
from dynaprune.families.attention import find_attentions
from dynaprune.neurons.candidates import blocks_of_group
from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.cut_plan import CutReport
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import BlockSparseLayer, swap_layers
from tests.rounding import agree

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HEADS, SIZE, HIDDEN, BLOCK = 4, 16, 64, 16
ATTENTION = "bert.encoder.layer.0.attention.self"
OUTPUT = "bert.encoder.layer.0.attention.output.dense"


def bert(kind: str = "BertForSequenceClassification", attention: str = "sdpa", **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    settings = dict(
        vocab_size=90,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=96,
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    model = getattr(transformers, kind)(transformers.BertConfig(**{**settings, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def texts(rows: int = 6, tokens: int = 20) -> dict[str, Tensor]:
    """A batch with padding, as a dict."""
    ids = torch.randint(5, 90, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    mask[4, 3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor], steps: int = 4
) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).logits.pow(2).sum().backward()
        optimizer.step()


def kill(model: nn.Module, name: str, rows: Any = (), columns: Any = ()) -> None:
    """Let block rows and block columns of a layer die."""
    layer = model.get_submodule(name)
    assert isinstance(layer, BlockSparseLayer)
    dead = torch.zeros_like(layer.layout.mask)
    dead[list(rows)] = True
    dead[:, list(columns)] = True
    layer.layout.release_(dead)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    training = model.training
    with torch.no_grad():
        found = model.eval()(**inputs)[0]
    model.train(training)
    return found


def cut(model: nn.Module, inputs: dict[str, Tensor], optimizers: Any = ()) -> CutReport:
    """Cut by one batch; the outputs for it and for another batch stay."""
    other = texts(5, 31)
    before = [outputs(model, each) for each in (inputs, other)]
    example = ExampleInputs.of(inputs)
    report = cut_dead_neurons(model, find_groups(model, example), example, optimizers)
    for old, each in zip(before, (inputs, other), strict=True):
        allowed = 256 * torch.finfo(old.dtype).eps * float(old.abs().max())
        assert float((outputs(model, each) - old).abs().max()) <= allowed
    return report


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dead", ["values", "output columns"])
def test_dead_heads_go_and_outputs_and_training_stay(attention: str, dead: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, inputs = bert(attention=attention), texts()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
        swap_layers(model, BLOCK, exclude=["bert.pooler"])
        train(model, optimizer, inputs)
        if dead == "values":
            kill(model, f"{ATTENTION}.value", rows=[1, 3])
        else:
            kill(model, OUTPUT, columns=[1, 3])
        twin = copy.deepcopy(model)
        twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, amsgrad=True)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        parameters = list(model.parameters())
        report = cut(model, inputs, [optimizer])
        assert report.neurons == {f"{ATTENTION}.value": 2 * SIZE} and not report.refused
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        module = model.get_submodule(ATTENTION)
        assert (module.num_attention_heads, module.all_head_size) == (HEADS - 2, (HEADS - 2) * SIZE)
        assert module.query.out_features == module.key.out_features == module.value.out_features == 2 * SIZE
        assert model.get_submodule(OUTPUT).in_features == 2 * SIZE
        assert model.bert.encoder.layer[1].attention.self.num_attention_heads == HEADS
        kept = torch.cat([torch.arange(16), torch.arange(32, 48)])
        for name, dimension in [(f"{ATTENTION}.query", 0), (f"{ATTENTION}.key", 0), (OUTPUT, 1)]:
            mine, old = model.get_submodule(name), twin.get_submodule(name)
            assert torch.equal(mine.weight, old.weight.index_select(dimension, kept)), name
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                found = mine.to_dense_shape(optimizer.state[mine.values][key])
                expected = old.to_dense_shape(twin_optimizer.state[old.values][key])
                assert torch.equal(found, expected.index_select(dimension, kept)), (name, key)
        if dead == "output columns":  # nothing reads those heads: every further step is the same
            train(model, optimizer, inputs, steps=5)
            train(twin, twin_optimizer, inputs, steps=5)
            torch.testing.assert_close(outputs(model, inputs), outputs(twin, inputs), rtol=1e-9, atol=1e-11)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_constant_is_recognised_behind_the_rounding_of_long_averages(attention: str) -> None:
    model, inputs = bert(attention=attention, max_position_embeddings=256), texts(6, 256)
    swap_layers(model, BLOCK, exclude=["bert.pooler"])
    kill(model, f"{ATTENTION}.value", rows=[1])
    report = cut(model, inputs)
    assert report.neurons == {f"{ATTENTION}.value": SIZE} and not report.refused


def test_dead_queries_or_keys_or_part_of_a_head_are_no_reason() -> None:
    model, inputs = bert(), texts()
    swap_layers(model, 8, exclude=["bert.pooler"])
    kill(model, f"{ATTENTION}.query", rows=[0, 1])
    kill(model, f"{ATTENTION}.key", rows=[2, 3])
    kill(model, f"{ATTENTION}.value", rows=[4])
    kill(model, OUTPUT, columns=[7])
    assert cut(model, inputs).neurons == {}
    assert model.get_submodule(ATTENTION).num_attention_heads == HEADS


def test_one_head_stays_and_feed_forward_neurons_go_beside_heads() -> None:
    model, inputs = bert(), texts()
    swap_layers(model, BLOCK, exclude=["bert.pooler"])
    kill(model, f"{ATTENTION}.value", rows=range(HEADS))
    kill(model, "bert.encoder.layer.0.intermediate.dense", rows=[0, 5])
    kill(model, "bert.encoder.layer.1.output.dense", columns=[2])
    report = cut(model, inputs)
    assert report.neurons == {
        f"{ATTENTION}.value": (HEADS - 1) * SIZE,
        "bert.encoder.layer.0.intermediate.dense": 2 * BLOCK,
        "bert.encoder.layer.1.intermediate.dense": BLOCK,
    }
    assert model.get_submodule(ATTENTION).num_attention_heads == 1


@pytest.mark.parametrize(("block", "heads_per_group"), [(8, 1), (32, 2), (64, 4)])
def test_groups_are_whole_heads_that_split_no_block(block: int, heads_per_group: int) -> None:
    model, inputs = bert(), texts()
    swap_layers(model, block, exclude=["bert.pooler"])
    neuron_map = find_groups(model, ExampleInputs.of(inputs))
    groups = neuron_map.of(f"{ATTENTION}.value")
    width = heads_per_group * SIZE
    assert [g.neurons.tolist() for g in groups] == [
        list(range(i, i + width)) for i in range(0, HIDDEN, width)
    ]
    assert not neuron_map.of(f"{ATTENTION}.query") and not neuron_map.of(f"{ATTENTION}.key")
    blocks = blocks_of_group(model, groups[0])
    assert set(blocks) == {*(f"{ATTENTION}.{each}" for each in ("query", "key", "value")), OUTPUT}
    for name, mask in blocks.items():
        whole = torch.zeros_like(mask)
        if name == OUTPUT:
            whole[:, : width // block] = True
        else:
            whole[: width // block] = True
        assert torch.equal(mask, whole), name


def test_saved_and_loaded_with_fewer_heads(tmp_path: Path) -> None:
    model, inputs = bert(), texts()
    swap_layers(model, BLOCK, exclude=["bert.pooler"])
    kill(model, f"{ATTENTION}.value", rows=[2])
    cut(model, inputs)
    dynaprune.save(model, tmp_path / "cut.safetensors")
    loaded = dynaprune.load(bert, tmp_path / "cut.safetensors")
    module = loaded.get_submodule(ATTENTION)
    assert (module.num_attention_heads, module.all_head_size) == (HEADS - 1, (HEADS - 1) * SIZE)
    assert agree(outputs(loaded, inputs), outputs(model, inputs))
    uncut = bert()
    dynaprune.save(uncut, tmp_path / "uncut.safetensors")
    back = dynaprune.load(loaded, tmp_path / "uncut.safetensors")
    module = back.get_submodule(ATTENTION)
    assert (module.num_attention_heads, module.all_head_size) == (HEADS, HIDDEN)
    assert agree(outputs(back, inputs), outputs(uncut, inputs))


def test_a_cut_that_changes_the_outputs_is_taken_back_with_the_counts() -> None:
    class Watched(nn.Module):
        """Reads a width by heart: it does not run with fewer heads."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, **inputs: Tensor) -> Any:
            assert self.inner.get_submodule(ATTENTION).all_head_size == HIDDEN
            return self.inner(**inputs)

    model, inputs = Watched(), texts()
    swap_layers(model, BLOCK, exclude=["inner.bert.pooler"])
    kill(model, f"inner.{ATTENTION}.value", rows=[0])
    report = cut(model, inputs)
    assert report.neurons == {} and "does not run" in report.refused[f"inner.{ATTENTION}.value"]
    assert model.get_submodule(f"inner.{ATTENTION}").num_attention_heads == HEADS


def test_wav2vec2_loses_heads_too() -> None:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_feat_extract_layers=2,
        vocab_size=12,
        mask_time_prob=0.0,
    )
    model = transformers.Wav2Vec2ForCTC(config)
    name = "wav2vec2.encoder.layers.0.attention"
    swap_layers(model, BLOCK, include=[name])
    assert [each.name for each in find_attentions(model)] == [name]
    nn.init.normal_(model.get_submodule(f"{name}.v_proj").bias)
    kill(model, f"{name}.v_proj", rows=[0])
    kill(model, f"{name}.out_proj", columns=[3])
    inputs = {"input_values": torch.randn(3, 700)}
    before = outputs(model, inputs)
    example = ExampleInputs.of(inputs)
    report = cut_dead_neurons(model, find_groups(model, example), example)
    assert report.neurons == {f"{name}.v_proj": 2 * SIZE}
    assert model.get_submodule(name).num_heads == HEADS - 2
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-5, atol=1e-6)


def test_attach_prunes_bert_with_dict_inputs_and_cuts_heads_from_copies_too() -> None:
    model, inputs = bert(), texts(8)
    labels = torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    average = torch.optim.swa_utils.AveragedModel(model)
    config = dynaprune.PruningConfig(
        target_sparsity=0.85, block_size=BLOCK, total_steps=24, interval=3, exclude=["bert.pooler"]
    )
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=inputs)
    pruner.follow(average)
    for _ in range(24):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
        average.update_parameters(model)
    report = pruner.report()
    assert report["target_reached"] and report["neurons_removed"] > 0
    counts = [
        (each.attention.self.num_attention_heads, each.attention.self.query.out_features // SIZE)
        for each in model.bert.encoder.layer
    ]
    assert all(attribute == layers for attribute, layers in counts)
    assert sum(attribute for attribute, _ in counts) < 2 * HEADS
    followed = [each.attention.self.num_attention_heads for each in average.module.bert.encoder.layer]
    assert followed == [attribute for attribute, _ in counts]
    assert torch.isfinite(outputs(average, inputs)).all()
    before = outputs(model, inputs)
    torch.testing.assert_close(outputs(pruner.finalize(), inputs), before, rtol=1e-5, atol=1e-6)


def test_a_tied_decoder_stays_dense_and_disturbs_nothing() -> None:
    model, inputs = bert("BertForMaskedLM"), texts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = dynaprune.PruningConfig(
        target_sparsity=0.5, block_size=BLOCK, total_steps=10, interval=2, include=["bert.encoder", "cls"]
    )
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=inputs)
    assert "cls.predictions.transform.dense" in pruner.layers
    assert "tied" in pruner.exempt["cls.predictions.decoder"]
    train(model, optimizer, inputs, steps=10)
    assert pruner.report()["target_reached"]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert torch.isfinite(outputs(model, inputs)).all()
