"""A model on the meta device begins sparse: its values, its buffers, and how little memory is ever taken."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dynaprune
from dynaprune.nn.block_sparse import BlockSparseLayer
from tests.pruning.attached import adam, assert_equal, dense_weights, mlp, train
from tests.pruning.test_sparse_start import Mixed, settings

transformers = pytest.importorskip("transformers")


def on_meta(build: Any) -> Any:
    with torch.device("meta"):
        return build()


def layers_of(model: nn.Module) -> dict[str, BlockSparseLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BlockSparseLayer)}


@pytest.mark.parametrize("build", [Mixed, mlp], ids=["mixed", "mlp"])
def test_values_and_buffers_are_those_of_the_model_built_on_its_device(build: Any) -> None:
    config = settings(block_size=8, initial_sparsity=0.4, target_sparsity=0.4)
    torch.manual_seed(1)
    real = build()
    dynaprune.prepare(real, config)
    model = on_meta(build)
    torch.manual_seed(1)
    prepared = dynaprune.prepare(model, config)
    assert not prepared.compared and sum(prepared.left_out.values()) > 0
    assert layers_of(model).keys() == layers_of(real).keys()
    assert_equal(dense_weights(model), dense_weights(real))
    mine, theirs = dict(model.named_buffers()), dict(real.named_buffers())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())


def test_it_trains_and_saves_as_any_other(tmp_path: Any) -> None:
    model = on_meta(mlp)
    prepared = dynaprune.prepare(model, settings(target_sparsity=0.7))
    optimizer = adam(model)
    pruner = dynaprune.attach(prepared, optimizer)
    train(model, optimizer)
    assert pruner.target_reached and pruner.report()["blocks_never_present"] == 48
    dynaprune.save(model, tmp_path / "model.safetensors")
    assert_equal(dense_weights(dynaprune.load(mlp(), tmp_path / "model.safetensors")), dense_weights(model))


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **changes}))


def bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))


@pytest.mark.parametrize("build", [llama, bert], ids=["llama", "bert"])
def test_buffers_of_transformers_and_what_is_tied_survive(build: Any) -> None:
    """Rotary frequencies, positions: buffers that no checkpoint holds."""
    model, real = on_meta(build), build()
    assert any(b.is_meta for b in model.buffers())
    dynaprune.prepare(model, settings())
    mine, theirs = dict(model.named_buffers()), dict(real.named_buffers())
    assert mine.keys() == theirs.keys() and len(mine) > 1
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if build is llama:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    deviation = model.config.initializer_range
    for name, layer in layers_of(model).items():
        mask = layer.weight.detach() != 0
        expected = deviation * (mask.shape[1] / mask.sum(1, keepdim=True)).sqrt()
        scaled = (layer.weight / expected)[mask]
        assert abs(float(scaled.std()) - 1) < 5 / math.sqrt(2 * len(scaled)), name
    for parameter in real.state_dict():
        if not parameter.endswith("weight"):
            assert torch.equal(model.state_dict()[parameter], real.state_dict()[parameter]), parameter


def test_outputs_are_those_of_the_dense_twin() -> None:
    model = on_meta(llama)
    dynaprune.prepare(model, settings())
    twin = copy.deepcopy(model)
    dynaprune.swap_back(twin)
    tokens = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits)


class Held(TorchDispatchMode):
    """The most bytes that tensors on the CPU hold at one time, of those that ops make."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    weakref.finalize(storage, self._free, key, size)
        self.most = max(self.most, self.now)
        return out


def test_at_most_one_dense_layer_is_there_at_a_time() -> None:
    wide, depth = 512, 8
    model = on_meta(lambda: nn.Sequential(*(nn.Linear(wide, wide) for _ in range(depth)), nn.Linear(wide, 2)))
    with Held() as held:
        dynaprune.prepare(model, settings(block_size=32, initial_sparsity=0.9, target_sparsity=0.9))
    dense = 4 * wide * wide
    kept = sum(4 * p.numel() for p in model.parameters())
    assert kept < 0.2 * depth * dense
    assert dense < held.most < kept + 1.5 * dense, "a weight, and which of its values are NaN"


class Tower(nn.Module):
    """As nanoGPT writes it: one initialiser for the layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 32), nn.LayerNorm(32)
        self.inner, self.head = nn.Linear(32, 64), nn.Linear(64, 20)
        self.register_buffer("mask", torch.ones(3, 3).tril().bool())
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)
        elif isinstance(module, Tower):
            module.mask.copy_(torch.ones(3, 3).tril().bool())


def test_the_initialiser_of_a_module_around_comes_after_the_own() -> None:
    model = on_meta(Tower)
    dynaprune.prepare(model, settings())
    assert torch.equal(model.head.weight, torch.full((20, 64), 0.5)) and model.head.bias.abs().max() > 0
    kept = model.inner.weight.detach() != 0
    rows = (32 / kept.sum(1, keepdim=True)).sqrt() * 0.5
    torch.testing.assert_close(model.inner.weight.detach(), torch.where(kept, rows, 0.0))
    assert torch.equal(model.norm.weight, torch.ones(32)) and float(model.table.weight.std()) > 0.5
    assert torch.equal(model.mask, torch.ones(3, 3).tril().bool())


class Pair(nn.Module):
    """It holds nothing of its own, and draws the weights of its layers in a loop over parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(32, 64), nn.Linear(64, 32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, gain=3.0)
            else:
                nn.init.constant_(parameter, 0.125)


class Pairs(nn.Module):
    """As many write it: the outermost module initialises layers inside by name, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.last, self.head = Pair(), nn.Linear(32, 64), nn.Linear(64, 4)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.last.weight, std=0.02)
        self.head.bias.data.fill_(0.5)


def test_initialisers_of_modules_that_hold_nothing_of_their_own() -> None:
    torch.manual_seed(0)
    twin = Pairs()
    model = on_meta(Pairs)
    torch.manual_seed(0)
    prepared = dynaprune.prepare(model, settings())
    assert prepared.swapped == ("pair.wide", "pair.back", "last")
    for name in prepared.swapped:
        layer, dense = model.get_submodule(name), twin.get_submodule(name)
        kept = layer.weight.detach() != 0
        rows = (kept.shape[1] / kept.sum(1, keepdim=True)).sqrt()
        torch.testing.assert_close(layer.weight.detach(), torch.where(kept, dense.weight * rows, 0.0))
        assert torch.equal(layer.bias, dense.bias)
        assert list(dict(layer.named_parameters())) == ["values", "bias"]
    assert torch.equal(model.head.weight, twin.head.weight) and torch.equal(model.head.bias, twin.head.bias)


def test_an_initialiser_leaves_alone_what_is_real() -> None:
    model = on_meta(Pairs)
    model.pair.wide = nn.Linear(32, 64)
    weight = model.pair.wide.weight.detach().clone()
    dynaprune.prepare(model, settings(exclude=["pair.wide"]))
    assert torch.equal(model.pair.wide.weight, weight)


class Extra(nn.Module):
    """A layer beside a tensor of its own."""

    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(32, 64), nn.Linear(64, 4)
        if name == "parameter":
            self.parameter = nn.Parameter(value)
        elif name == "attribute":
            self.attribute = value
        else:
            self.register_buffer(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parameter", torch.ones(3)),
        ("numbers", torch.arange(4)),
        ("truths", torch.ones(4, dtype=torch.bool)),
        ("bytes", torch.ones(4, dtype=torch.uint8)),
    ],
)
def test_a_tensor_that_nothing_sets_is_named(name: str, value: Tensor) -> None:
    model = on_meta(lambda: Extra(name, value.to("meta")))
    with pytest.raises(ValueError, match=rf"cannot give {name} a value: Extra has no reset_parameters"):
        dynaprune.prepare(model, settings())


def test_what_is_real_stays_as_it_is() -> None:
    numbers = torch.arange(4.0)
    model = on_meta(lambda: Extra("numbers", numbers))
    model.head = nn.Linear(64, 4)
    weight = model.head.weight
    dynaprune.prepare(model, settings())
    assert model.numbers is numbers and model.head.weight is weight
    assert isinstance(model.inner, BlockSparseLayer) and not model.inner.values.is_meta


def test_what_is_refused_is_refused_before_anything_changes() -> None:
    attribute = on_meta(lambda: Extra("attribute", torch.ones(3, device="meta")))
    with pytest.raises(ValueError, match="cannot materialise attribute: it is a tensor on the meta device"):
        dynaprune.prepare(attribute, settings())
    model = on_meta(mlp)
    with pytest.raises(ValueError, match=r"on the meta device .*give it weights first"):
        dynaprune.prepare(model, settings(initial_sparsity=0.0))
    with pytest.raises(ValueError, match=r"on the meta device .*or let dynaprune\.prepare begin it sparse"):
        dynaprune.attach(model, torch.optim.SGD(model.parameters(), 0.1), settings())
    with pytest.raises(ValueError, match="expected floors of pruned layers"):
        dynaprune.prepare(model, settings(floors={"nowhere": 0.5}))
    with pytest.raises(ValueError, match="initial_sparsity of at most"):
        dynaprune.prepare(model, settings(initial_sparsity=0.95, target_sparsity=0.95))
    assert all(p.is_meta for p in model.parameters()) and not layers_of(model)
    dynaprune.prepare(model, settings())
    with pytest.raises(ValueError, match="got 0 block-sparse"):
        dynaprune.prepare(model.to("meta"), settings())
    with pytest.raises(ValueError, match="expected a device with a model on the meta device only, got cpu"):
        dynaprune.prepare(mlp(), settings(), device="cpu")
