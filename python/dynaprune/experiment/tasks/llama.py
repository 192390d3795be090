"""A Llama with random weights, in sizes that a CPU trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["SIZES", "Size", "build", "llama_config", "logits"]


@dataclass(frozen=True)
class Size:
    """Layers, width, heads of queries, heads of keys and values, and width of the gated feed-forward part
    (about 8/3 of the width; Shazeer 2020, "GLU Variants Improve Transformer", section 3.1). Widths are
    multiples of 16, for blocks."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int


SIZES = {
    "tiny": Size(2, 64, 4, 2, 176),
    "small": Size(2, 128, 4, 2, 352),
    "base": Size(6, 256, 8, 4, 704),
}


def llama_config(size: Size, entries: int, context: int, dropout: float = 0.0) -> Any:
    """The ``LlamaConfig`` of a vocabulary of ``entries`` tokens, the first of them the end of a text.

    Token embeddings and head share their weights. ``dropout`` is that of attention weights, the only one
    that this family has; above 0 torch leaves its fused attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=entries,
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=context,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def build(config: Any) -> nn.Module:
    """``LlamaForCausalLM`` with random weights by torch's global seed, float32."""
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(config)
    return model.float()


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the token after each of ``tokens`` (int ``[n, length]``): ``[n, length, entries]``."""
    found: torch.Tensor = model(tokens).logits
    return found
