"""FLOPs of matrix products that torch's counter leaves out: a network's figure would lack them silently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["uncounted_by_torch"]


def uncounted_by_torch() -> dict[Any, Callable[..., int]]:
    """Formulas by op, for ``FlopCounterMode(custom_mapping=...)``; they get shapes in place of tensors.

    Fused attention on the CPU counts as it does on a GPU. Recurrent layers count the products of input and
    state with their weights; backward twice that. Grouped products (stacked experts) count every row once.
    """
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._grouped_mm: _grouped,
        aten._trilinear: _trilinear,
        aten.mkldnn_rnn_layer: _fused_recurrent_layer,
        aten.mkldnn_rnn_layer_backward: _fused_recurrent_layer_backward,
        aten._cudnn_rnn: _cudnn_recurrent,
        aten._cudnn_rnn_backward: _cudnn_recurrent_backward,
    }


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    # [M, K] or [G, M, K] by [K, N] or [G, K, N]: where one operand is flat, its rows are dealt to the groups.
    groups = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * groups * a[-2] * a[-1] * b[-1])


def _trilinear(
    i1: Any,
    i2: Any,
    i3: Any,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    *_: Any,
    **__: Any,
) -> int:
    def expanded(shape: Any, dims: list[int]) -> list[int]:
        sizes = list(shape)
        for dim in dims:
            sizes.insert(dim, 1)
        return sizes

    operands = zip(expanded(i1, expand1), expanded(i2, expand2), expanded(i3, expand3), strict=True)
    return 2 * math.prod(max(sizes) for sizes in operands)


def _fused_recurrent_layer(inputs: Any, of_input: Any, of_state: Any, *_: Any, **__: Any) -> int:
    # inputs [time, batch, features]; weights [gates * hidden, features] and [gates * hidden, hidden].
    return int(2 * inputs[0] * inputs[1] * (math.prod(of_input) + math.prod(of_state)))


def _fused_recurrent_layer_backward(inputs: Any, of_input: Any, of_state: Any, *_: Any, **__: Any) -> int:
    return 2 * _fused_recurrent_layer(inputs, of_input, of_state)


def _cudnn_recurrent(inputs: Any, weights: Any, *_: Any, **__: Any) -> int:
    # inputs [time, batch, features] or packed [all steps, features]; every weight meets every step once.
    positions = math.prod(inputs[:-1])
    return int(2 * positions * sum(math.prod(weight) for weight in weights if len(weight) == 2))


def _cudnn_recurrent_backward(inputs: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _cudnn_recurrent(inputs, weights)
