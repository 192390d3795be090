"""The figures of ``benchmarks.minilm_neurons``, beside networks whose figures are counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import dynaprune
from benchmarks.minilm_neurons import Figures, activations, figures_of, saved_bytes, shares_gone, table
from dynaprune import PruningConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=40, num_hidden_layers=2, num_attention_heads=5, intermediate_size=80,
        max_position_embeddings=128, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def test_what_is_saved_counts_once_and_without_parameters() -> None:
    """A perceptron keeps its input, and what is behind the ReLU for both that and the layer that reads it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    assert saved_bytes(lambda: model(x), model) == 4 * (5 * 8 + 5 * 16)
    assert saved_bytes(lambda: model(x).relu(), model) == 4 * (5 * 8 + 5 * 16 + 5 * 4)


def test_the_figures_of_a_network_that_lost_heads_and_neurons() -> None:
    model, example = bert(), {"input_ids": torch.randint(5, 50, (2, 9))}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    config = PruningConfig(
        units="neurons", target_sparsity=0.4, total_steps=10, interval=1, allocation="uniform",
        exclude=["bert.pooler"],
    )  # fmt: skip
    pruner = dynaprune.attach(model, optimizer, config, example_inputs=example)
    for _ in range(10):
        optimizer.zero_grad()
        model(**example).logits.square().mean().backward()
        optimizer.step()
    assert pruner.target_reached
    heads, neurons = shares_gone(model)
    assert heads == pytest.approx(0.4) and neurons == pytest.approx(0.4, abs=0.02)
    assert 0.5 < activations(model) / activations(bert()) < 0.95
    report = {
        "baseline": {"test_accuracy": 0.9},
        "pruned": {"test_accuracy": 0.897},
        "ratios": {"step_seconds_last_to_dense": 0.7},
    }
    found = figures_of(3, report, bert(), model)
    assert found.lost == pytest.approx(0.3) and (found.seed, found.time) == (3, 0.7)
    assert found.gone == (heads, neurons)


def test_the_table_says_whether_the_criterion_holds() -> None:
    one = Figures(0, 90.0, 89.8, 0.7, 0.71, (0.4, 0.4))
    other = replace(one, seed=1, pruned=89.3)
    assert "C6 holds" in table([one, other])  # 0.45 points in the mean
    assert "| mean | 90.00 % | 89.55 % | +0.45 | 0.700 | 0.710 | 40.0 % | 40.0 % |" in table([one, other])
    for worse in (replace(one, pruned=89.4), replace(one, time=0.8), replace(one, activations=0.76)):
        assert "C6 does not hold" in table([worse])
