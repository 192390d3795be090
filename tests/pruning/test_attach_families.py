"""A whole run with neurons over networks whose graphs once could not be followed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynaprune

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

STEPS = 20


def decoder() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )


def test_a_decoder_with_rotary_embeddings_loses_gated_neurons_under_a_trial() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ids = torch.randint(0, 99, (32, 8))

    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch).logits[:, :-1].transpose(1, 2)
        return F.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1)

    config = dynaprune.PruningConfig(target_sparsity=0.9, block_size=8, total_steps=STEPS, floor=0.0)
    trial = dynaprune.CalibrationTrial(model, ids, losses)
    pruner = dynaprune.attach(model, optimizer, config, trial=trial)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert pruner.target_reached
    mlp = model.model.layers[0].mlp
    assert mlp.gate_proj.out_features == mlp.up_proj.out_features == mlp.down_proj.in_features < 64
    before = losses(model.eval(), ids).detach()
    torch.testing.assert_close(losses(pruner.finalize().eval(), ids), before, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """timm's block: one projection for queries, keys and values, reshaped by a fixed number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 64, 8, 8), nn.Parameter(torch.zeros(1, 1, 64))
        self.block, self.head = Block(), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.block(torch.cat([self.cls.expand(x.shape[0], -1, -1), patches], 1))[:, 0])


def test_a_vision_transformer_loses_feed_forward_neurons_and_says_why_heads_stay() -> None:
    model = VisionTransformer()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 4, (8,))
    config = dynaprune.PruningConfig(target_sparsity=0.9, block_size=8, total_steps=40, score="magnitude")
    pruner = dynaprune.attach(model, optimizer, config)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert pruner.ledger.neurons > 0 and model.block.fc1.out_features < 256
    assert model.block.fc1.out_features == model.block.fc2.in_features
    refused = pruner.tracer.refused
    assert "the whole model" not in refused
    assert "LayerNorm" in refused["block.fc2"]
    assert model.block.qkv.out_features == 192
