"""Networks with PEFT's adapters: the adapters stay whole, and PEFT reads back what it saved."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import dynaprune
from dynaprune.neurons.cut import cut_dead_neurons
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.neurons.groups import find_groups
from dynaprune.nn import BlockSparseLayer, swap_layers
from tests.rounding import agree

STEPS = 12
ATTENTION = ["query", "value"]
CLASSIFIES: dict[str, Any] = {"task_type": "SEQ_CLS"}
WEIGHTS_OF_THE_BODY = 4 * 64 * 64 + 2 * 64 * 128 + 64 * 64


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **dropout, num_hidden_layers=1)).eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (16, 6), generator=generator)
    return {"input_ids": ids, "labels": (ids[:, 0] > 24).long()}


def lora(**changes: Any) -> peft.LoraConfig:
    """Of rank 8 beside queries and values; its own start is not zero."""
    chosen = {"r": 8, "target_modules": ATTENTION, "init_lora_weights": False, **CLASSIFIES, **changes}
    return peft.LoraConfig(**chosen)


def soft(kind: Any, **options: Any) -> Callable[[], Any]:
    return lambda: kind(num_virtual_tokens=4, **CLASSIFIES, **options)


KINDS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=ATTENTION, total_step=100, **CLASSIFIES),
    "ia3": lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[], **CLASSIFIES),
    "loha": lambda: peft.LoHaConfig(r=8, target_modules=ATTENTION),
    "lokr": lambda: peft.LoKrConfig(r=8, target_modules=ATTENTION),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=ATTENTION),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=ATTENTION),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], **CLASSIFIES),
    "prompts": soft(peft.PromptTuningConfig),
    "prompts of an encoder": soft(peft.PromptEncoderConfig, encoder_hidden_size=64),
    "prefixes": soft(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=64),
}


def adapted(kind: str = "lora", *, body: bool = False) -> Any:
    """A network with adapters; ``body``: all of it trains."""
    model = peft.get_peft_model(base(), KINDS[kind]())
    if body:
        model.get_base_model().bert.requires_grad_(True)
    return model


def pruned(model: Any, steps: int = STEPS, **changes: Any) -> dynaprune.Pruner:
    """Train what trains, and prune half of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    settings = {"target_sparsity": 0.5, "block_size": 8, "total_steps": STEPS, "interval": 2, **changes}
    pruner = dynaprune.attach(model, optimizer, dynaprune.PruningConfig(**settings))
    train(model, optimizer, steps)
    return pruner


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()


def outputs(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


def adapter_parts(model: nn.Module) -> dict[str, tuple[type, torch.Size]]:
    """Type of module and shape of every Parameter that is not the base's."""
    return {
        f"{name}.{key}": (type(module), p.shape)
        for name, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None
        and any(part in name for part in ("lora", "lokr", "default", "prompt", "ia3", "hada", "vera", "oft"))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_network_with_adapters_is_refused_as_it_was(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    settings = dynaprune.PruningConfig(target_sparsity=0.5, block_size=8, total_steps=STEPS)
    with pytest.raises(
        ValueError, match=r"adapters \(.*PEFT's .*\) are never pruned.*merge_and_unload"
    ) as told:
        dynaprune.attach(model, optimizer, settings)
    assert f"7 are frozen ({WEIGHTS_OF_THE_BODY:,} weights)" in str(told.value)
    assert not any(isinstance(module, BlockSparseLayer) for module in model.modules())
    if kind != "prefixes":  # which BERT does not take
        train(model, optimizer, 2)
        expected = outputs(model)
        model.save_pretrained(tmp_path)
        assert agree(outputs(peft.PeftModel.from_pretrained(base(), tmp_path)), expected)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("prefixes", "lokr", "prompts of an encoder")]
)
def test_a_network_that_trains_is_pruned_and_its_adapters_are_not(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, body=True)
    before = adapter_parts(model)
    pruner = pruned(model)
    assert before and adapter_parts(model) == before
    report = pruner.report()
    assert (
        report["target_reached"] and len(pruner.layers) >= 5
    )  # two fewer where the adapter reads the weight
    for name in set(report["layers"]) - set(pruner.layers):
        assert report["layers"][name]["exempt"], name
    expected = outputs(model)

    model.save_pretrained(tmp_path)
    network = pruner.finalize().get_base_model()
    assert agree(outputs(model), expected)
    if isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner):
        network = copy.deepcopy(model).unload()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(network), tmp_path)
    assert agree(outputs(again), expected)


def test_layers_without_a_block_sparse_form_are_not_called_frozen() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 8, "n_embd": 64, "n_layer": 1, "n_head": 2}
    model = peft.get_peft_model(
        GPT2LMHeadModel(GPT2Config(**sizes)),
        peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    settings = dynaprune.PruningConfig(block_size=8, total_steps=STEPS)
    with pytest.raises(ValueError, match=r"1 of PEFT's lora\).* 0 are frozen .*4 layers of type .*Conv1D"):
        dynaprune.attach(model, optimizer, settings)


def test_the_script_of_the_report(tmp_path: Path) -> None:
    """Adapters pruned in place of the network, and lost on saving: refused, and the training goes on."""
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    with pytest.raises(
        ValueError, match=r"adapters \(2 of PEFT's lora, 1 of PEFT's modules_to_save\) are never"
    ):
        dynaprune.attach(model, optimizer, dynaprune.PruningConfig(block_size=8, total_steps=30))
    train(model, optimizer, 4)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("lora_A" in key for key in saved) == sum("lora_B" in key for key in saved) == 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert agree(outputs(again), outputs(model))


@pytest.mark.parametrize("sleeping", [False, True])
def test_neurons_go_where_no_adapter_is_awake_or_asleep(sleeping: bool) -> None:
    model = adapted(body=True)
    if sleeping:
        model.add_adapter("sleeping", lora(target_modules=["intermediate.dense"]))
        model.get_base_model().bert.requires_grad_(True)
    swap_layers(model, 8)
    layer = model.get_base_model().bert.encoder.layer[0]
    for reader, blocks in ((layer.output.dense, 4), (layer.attention.output.dense, 2)):
        mask = reader.layout.mask.clone()
        mask[:, :blocks] = False
        reader.layout.update_(mask)
    expected = outputs(model)
    example = ExampleInputs.of(batch())
    report = cut_dead_neurons(model, find_groups(model, example), example)
    wide = layer.intermediate.dense.get_base_layer() if sleeping else layer.intermediate.dense
    assert wide.out_features == (128 if sleeping else 96)
    assert layer.attention.self.value.get_base_layer().out_features == 64
    assert layer.attention.self.value.lora_B["default"].out_features == 64
    assert any(
        "an adapter changes it (PEFT's lora)" in str(reason) for reason in groups_refused(model, example)
    )
    assert sum(report.neurons.values()) == (0 if sleeping else 32)
    assert agree(outputs(model), expected)


def groups_refused(model: nn.Module, example: ExampleInputs) -> list[str]:
    return list(find_groups(model, example).refused.values())


def test_prompts_over_a_network_that_loses_neurons(tmp_path: Path) -> None:
    model = adapted("prompts", body=True)
    pruner = pruned(model, target_sparsity=0.9)
    assert pruner.report()["neurons_removed"] > 0
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    network = copy.deepcopy(pruner.finalize().base_model)
    assert agree(outputs(peft.PeftModel.from_pretrained(network, tmp_path)), expected)


def test_writing_into_removed_blocks_raises_before_finalize_and_merging_works_after() -> None:
    model = adapted(body=True)
    pruner = pruned(model)
    expected = outputs(model)
    said = r"writes into removed blocks of layer .*base_layer: .*then merge"
    for safe_merge in (False, True):
        with pytest.raises(RuntimeError, match=said):
            model.merge_adapter(safe_merge=safe_merge)
        assert agree(outputs(model), expected)
    with pytest.raises(RuntimeError, match="writes into removed blocks"):  # it starts from the weight
        copy.deepcopy(model).add_adapter("principal", lora(init_lora_weights="pissa"))
    plain = pruner.finalize()
    for safe_merge in (False, True):
        merged = copy.deepcopy(plain).merge_and_unload(safe_merge=safe_merge)
        assert type(merged.bert.encoder.layer[0].attention.self.query) is nn.Linear
        assert agree(outputs(merged), expected)


def test_merged_adapters_are_refused_at_attach_until_they_are_taken_out() -> None:
    model = adapted(body=True)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters \(2, the first at .*query\): .*unmerge_adapter"):
        pruned(model)
    model.unmerge_adapter()
    assert pruned(model).target_reached
    for _, module in model.named_modules():
        assert not getattr(module, "merged", False)


def test_adapters_that_freeze_the_network_after_attach_are_told() -> None:
    model = base()
    pruner = pruned(model, steps=4)
    prompted = peft.get_peft_model(model, KINDS["prompts"]())
    with pytest.raises(RuntimeError, match=r"frozen after attach .*pruner.finalize\(\) before"):
        train(prompted, pruner.optimizers[0], 1)


@pytest.fixture(scope="module")
def before_and_after_finalize() -> tuple[Any, Any]:
    """A pruned network with block-sparse layers, and with plain ones."""
    model = base()
    pruner = pruned(model)
    sparse = copy.deepcopy(model)
    return sparse, pruner.finalize()


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "ia3", "loha", "lokr", "oft", "vera"])
def test_peft_adds_adapters_to_a_pruned_network_after_finalize_only(
    kind: str, before_and_after_finalize: tuple[Any, Any], tmp_path: Path
) -> None:
    sparse, again = copy.deepcopy(before_and_after_finalize)
    with pytest.raises((TypeError, ValueError), match=r"not supported|No layers types compatible"):
        peft.get_peft_model(sparse, KINDS[kind]())
    model = peft.get_peft_model(copy.deepcopy(again), KINDS[kind]())
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2), 2)
    model.save_pretrained(tmp_path)
    assert agree(outputs(peft.PeftModel.from_pretrained(again, tmp_path)), outputs(model))


def test_files_and_copies_of_a_pruned_network_with_adapters(tmp_path: Path) -> None:
    model = adapted(body=True)
    pruner = pruned(model)
    expected = outputs(model)
    file = dynaprune.save(model, tmp_path / "model.safetensors")
    fresh = dynaprune.load(adapted(), file)
    assert agree(outputs(fresh), expected) and agree(outputs(copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path)
    peft.set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert agree(outputs(model), expected)
    with pytest.raises(ValueError, match="expected the structure of this model, got another's"):
        dynaprune.load(base(), file)
    pruner.detach()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    with pytest.raises(
        ValueError, match=r"a block-sparse layer that can be pruned on, got none: .* it is frozen"
    ):
        dynaprune.attach(model, optimizer, dynaprune.PruningConfig(block_size=8, total_steps=30))


def test_convolutions_with_adapters_beside_one_that_trains() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten()
    )
    network = nn.Sequential(*plain, nn.Linear(64 * 4, 4))
    model = peft.get_peft_model(network, peft.LoraConfig(r=8, target_modules=["1"], modules_to_save=["5"]))
    network[3].requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    settings = dynaprune.PruningConfig(target_sparsity=0.5, block_size=8, total_steps=STEPS, interval=1)
    pruner = dynaprune.attach(model, optimizer, settings)
    x = torch.randn(8, 3, 8, 8)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 4).backward()
        optimizer.step()
    assert list(pruner.layers) == ["base_model.model.3"] and pruner.target_reached
    assert network[5].modules_to_save["default"].weight.shape == (4, 256)


@pytest.mark.parametrize("body", [False, True])
def test_the_trainers_callback(body: bool, tmp_path: Path) -> None:
    model = adapted(body=body)
    rows = [
        dict(zip(("input_ids", "labels"), row, strict=True)) for row in zip(*batch().values(), strict=True)
    ]
    settings = dynaprune.PruningConfig(target_sparsity=0.5, block_size=8, interval=1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )

    def run() -> dynaprune.DynaPruneCallback:
        callback = dynaprune.DynaPruneCallback(model, settings, trial=False)
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        return callback

    if not body:
        with pytest.raises(ValueError, match="are never pruned"):
            run()
        return
    assert run().pruner.target_reached
    model.save_pretrained(tmp_path / "adapters")
    saved = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert sorted(tuple(tensor.shape) for key, tensor in saved.items() if "lora" in key) == 2 * [
        (8, 64)
    ] + 2 * [(64, 8)]
