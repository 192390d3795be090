"""A Llama with random weights, in sizes that a CPU trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

__all__ = [
    "SIZES",
    "Size",
    "build",
    "llama_config",
    "logits",
    "narrower",
    "narrower_inside",
    "size_of",
]

_FEED_FORWARD_STEP = 8


@dataclass(frozen=True)
class Size:
    """Layers, width, heads of queries, heads of keys and values, and width of the gated feed-forward part
    (about 8/3 of the width; Shazeer 2020, "GLU Variants Improve Transformer", section 3.1). Widths are
    multiples of 16, for blocks. ``head_width``: of each head, where the heads do not share the width."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int
    head_width: int | None = None

    @property
    def width_of_heads(self) -> int:
        """Width of each head: by default the heads share the width."""
        return self.head_width or self.width // self.heads

    def __str__(self) -> str:
        """As `size_of` reads it."""
        numbers = (self.layers, self.width, self.heads, self.key_value_heads, self.feed_forward)
        return "x".join(map(str, (*numbers, *([self.head_width] if self.head_width else []))))


SIZES = {
    "tiny": Size(2, 64, 4, 2, 176),
    "small": Size(2, 128, 4, 2, 352),
    "base": Size(6, 256, 8, 4, 704),
}


def size_of(text: str) -> Size:
    """A named size, or LAYERSxWIDTHxHEADSxKEY_VALUE_HEADSxFEED_FORWARD[xHEAD_WIDTH].

    Raises:
        ValueError: neither, or numbers that make no Llama."""
    if text in SIZES:
        return SIZES[text]
    numbers = text.split("x")
    if len(numbers) not in (5, 6) or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
        raise ValueError(
            f"size must be one of {', '.join(SIZES)}, or LAYERSxWIDTHxHEADSxKEY_VALUE_HEADSxFEED_FORWARD"
            f"[xHEAD_WIDTH] (6x256x8x4x704), got {text!r}"
        )
    size = Size(*map(int, numbers))
    if size.head_width is None and size.width % size.heads:
        raise ValueError(f"size must have a width that is a multiple of its {size.heads} heads, got {text!r}")
    if size.heads % size.key_value_heads or size.width_of_heads % 2:
        raise ValueError(
            "size must have heads of an even width, as many for each head of keys and values, got "
            f"{size.heads} heads of {size.width_of_heads}, {size.key_value_heads} of keys and values"
        )
    return size


def narrower(size: Size) -> list[list[Size]]:
    """Ever wider networks up to ``size``, narrower throughout: all heads, each of an even width, the
    feed-forward part in its proportion, then parts up to a seventh wider or narrower."""
    step, ratio = 2 * size.heads, size.feed_forward / size.width
    return [_near(replace(size, width=w), ratio * w) for w in range(step, size.width + 1, step)]


def narrower_inside(size: Size) -> list[list[Size]]:
    """Ever wider networks up to ``size`` with its residual width: all heads, each of an even width, and the
    feed-forward part as much narrower as they are, then up to a seventh wider or narrower."""
    whole = size.width_of_heads
    return [
        _near(replace(size, head_width=each), size.feed_forward * each / whole)
        for each in range(2, whole + 1, 2)
    ]


def _near(size: Size, feed_forward: float) -> list[Size]:
    usual = max(_FEED_FORWARD_STEP, _FEED_FORWARD_STEP * round(feed_forward / _FEED_FORWARD_STEP))
    reach = int(feed_forward / 7) // _FEED_FORWARD_STEP * _FEED_FORWARD_STEP
    others = range(max(usual - reach, _FEED_FORWARD_STEP), usual + reach + 1, _FEED_FORWARD_STEP)
    return [replace(size, feed_forward=each) for each in (usual, *(o for o in others if o != usual))]


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
        head_dim=size.width_of_heads,
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
