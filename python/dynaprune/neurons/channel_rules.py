"""What each operation does with channels: rules by the name of the ATen operator.

A rule gets a :class:`Call` and returns the labels of the call's first output, broadcastable to it. Operations
that only change the view need none: labels live with the memory. For an operation without a rule all channels
in its inputs are blocked, by name, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaprune.neurons.channel_sets import NEUTRAL, ChannelSets, Labels


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Args:
        arguments: by name. inputs: all tensors among them. out: the tensor that gets labels.
        labels: of a tensor. why: the reason for a block, from what the operation does.
    """

    name: str
    function: Any
    arguments: dict[str, Any]
    inputs: list[Tensor]
    out: Tensor
    sets: ChannelSets
    labels: Callable[[Tensor], Labels]
    why: Callable[[str], str]

    def of(self, argument: str) -> Labels:
        """Labels of the argument of that name."""
        return self.labels(self.arguments[argument])

    def first(self) -> Labels:
        """Labels of the first tensor."""
        return self.labels(self.inputs[0])

    def mixes(self) -> str:
        """The reason where channels end in one sum."""
        return self.why(f"{self.name} mixes its channels")


Rule = Callable[[Call], Tensor | None]


def rule_for(function: Any, name: str) -> Rule | None:
    """The rule for an operator, None where there is none."""
    if name in _RULES:
        return _RULES[name]
    if name.startswith("_scaled_dot_product"):
        return _attention
    return pointwise if torch.Tag.pointwise in function.tags else None


_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__}
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask")


def function_rule(function: Any, args: Any, kwargs: Any) -> tuple[str, dict[str, Any], Rule] | None:
    """Name, arguments and rule of a function that is followed as a whole; None where it is not."""
    if function in _PRODUCTS and len(args) == 2 and not kwargs:
        a, b = reversed(args) if function is Tensor.__rmatmul__ else args
        if isinstance(a, Tensor) and isinstance(b, Tensor) and min(a.dim(), b.dim()) > 2:
            return "matmul", {"a": a, "b": b}, _batched_product
    if function is F.scaled_dot_product_attention:
        arguments = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False))
        arguments |= {name: kwargs[name] for name in _ATTENTION_ARGUMENTS if name in kwargs}
        if all(
            type(arguments[name]) is Tensor and arguments[name].dim() > 2
            for name in ("query", "key", "value")
        ):
            return "attention", arguments, _attention
    return None


def _batched_product(call: Call) -> Tensor:
    return call.sets.contract(call.of("a"), call.of("b"), call.out.dim(), call.mixes())


def pointwise(call: Call) -> Tensor:
    """Element by element, operands broadcast."""
    return call.sets.combine([call.labels(each) for each in call.inputs], call.out.dim())


def _same(call: Call) -> Tensor:
    return call.first().values


def _constant(call: Call) -> Tensor:
    """The same everywhere, or drawn alike everywhere."""
    return torch.full((1,) * call.out.dim(), NEUTRAL, dtype=torch.int32)


def _copied(call: Call) -> Tensor:
    values = call.of("src").values
    return values.reshape((1,) * (call.out.dim() - values.dim()) + tuple(values.shape))


def _dims(dims: Any, ndim: int) -> list[int]:
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in ([dims] if isinstance(dims, int) else dims)] if ndim else []


def reduction(call: Call) -> Tensor:
    """Sums, means, extremes, sorts along ``dim`` (everything by default), which may stay or go."""
    x = call.first()
    ndim = len(x.shape)
    dims = _dims(call.arguments.get("dim"), ndim)
    merged = call.sets.merge(x, dims, call.mixes()).values
    if call.out.dim() < ndim:
        merged = merged[tuple(0 if d in dims else slice(None) for d in range(ndim))]
    return merged


def _softmax(call: Call) -> Tensor:
    values = reduction(call)
    call.sets.mark_along(values)
    return call.first().values


def _spatial(call: Call) -> Tensor:
    """Pooling, resizing and padding: within a channel, along the last dimensions."""
    x = call.first()
    count = next(int(c) for c in call.name if c.isdigit())
    ndim = len(x.shape)
    return call.sets.merge(x, range(ndim - count, ndim), call.mixes()).values


def _norm(call: Call) -> Tensor:
    x = call.first()
    count = len(call.arguments["normalized_shape"])
    ndim = len(x.shape)
    call.sets.merge(x, range(ndim - count, ndim), call.why("it normalises over its channels"))
    return call.sets.combine([call.labels(each) for each in call.inputs], call.out.dim())


def _group_norm(call: Call) -> Tensor:
    x = call.first()
    call.sets.block(x.values, call.why("it normalises over its channels"))
    return x.values


def _matmul(call: Call) -> Tensor:
    *bias, a, b = call.inputs
    labels = call.sets.contract(call.labels(a), call.labels(b), call.out.dim(), call.mixes())
    if not bias:
        return labels
    product = Labels(labels, tuple(call.out.shape))
    return call.sets.combine([product, call.labels(bias[0])], call.out.dim())


def _vector_product(call: Call) -> Tensor | None:
    """``mv`` and ``dot``: as matrices of one column, or one row and one column."""
    a, b = (call.labels(each) for each in call.inputs)
    row = Labels(a.values.unsqueeze(0), (1, *a.shape)) if len(a.shape) == 1 else a
    column = Labels(b.values.unsqueeze(1), (*b.shape, 1))
    product = call.sets.contract(row, column, 2, call.mixes())
    return product.squeeze(1).squeeze(0) if len(a.shape) == 1 else product.squeeze(1)


def _attention(call: Call) -> Tensor:
    query, key, value = (call.of(each) for each in ("query", "key", "value"))
    ndim = len(query.shape)
    if key.shape[:-2] != query.shape[:-2] and ndim == len(key.shape):
        key, value = (_repeated_heads(each, query.shape[-3]) for each in (key, value))
    turned = Labels(key.values.transpose(-1, -2), (*key.shape[:-2], key.shape[-1], key.shape[-2]))
    scores = call.sets.contract(query, turned, ndim, call.mixes())
    weights = Labels(scores, (*query.shape[:-1], key.shape[-2]))
    bias = next((call.labels(each) for each in call.inputs[3:]), None)
    if bias is not None:
        weights = Labels(call.sets.combine([weights, bias], ndim), weights.shape)
    call.sets.mark_along(weights.values)
    return call.sets.contract(weights, value, ndim, call.mixes())


def _repeated_heads(x: Labels, heads: int) -> Labels:
    """Grouped queries: every key and value head serves several query heads."""
    dim = len(x.shape) - 3
    values = x.values
    if values.size(dim) > 1:
        values = values.repeat_interleave(heads // x.shape[dim], dim)
    return Labels(values, (*x.shape[:dim], heads, *x.shape[dim + 1 :]))


def _joined(parts: Sequence[Labels], dim: int) -> Tensor:
    ndim = len(parts[0].shape)
    sizes = [max(part.values.size(d) for part in parts) for d in range(ndim)]
    pieces = []
    for part in parts:
        sizes[dim] = part.shape[dim]
        pieces.append(part.values.expand(sizes))
    return torch.cat(pieces, dim)


def _cat(call: Call) -> Tensor:
    parts = [x for x in map(call.labels, call.inputs) if len(x.shape) == call.out.dim()]
    return _joined(parts, call.arguments["dim"] % call.out.dim())


def _stack(call: Call) -> Tensor:
    dim = call.arguments["dim"] % call.out.dim()
    parts = [call.labels(each) for each in call.inputs]
    return _joined([Labels(x.values.unsqueeze(dim), (*x.shape[:dim], 1, *x.shape[dim:])) for x in parts], dim)


def _moved(call: Call) -> Tensor | None:
    """Elements change their place only: the operator itself moves the labels."""
    data = {"self", "src", "source", "values", "input", "weight"}
    arguments: dict[str, Any] = {}
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and name in data:
            labels = call.labels(value)
            call.sets.work += value.numel()
            arguments[name] = labels.values.expand(labels.shape)
        elif name == "value" and not isinstance(value, Tensor):
            arguments[name] = NEUTRAL
        else:
            arguments[name] = _places(call, value)
    if call.name not in _PLACES_ONLY:
        call.sets.mark_scaled(call.first().values)
    if call.arguments.get("accumulate") or call.arguments.get("reduce"):
        return None
    positional = [a.name for a in call.function._schema.arguments if not a.kwarg_only]
    given = {k: v for k, v in arguments.items() if k not in positional and k != "out"}
    return call.function(*(arguments[name] for name in positional), **given)


def _places(call: Call, value: Any) -> Any:
    """Indices and masks on the CPU; channels that say what goes where must stay."""
    if isinstance(value, Tensor):
        call.sets.block(call.labels(value).values, call.why(f"they say what {call.name} takes"))
        return value.cpu()
    return [_places(call, each) for each in value] if isinstance(value, (list, tuple)) else value


def _along_dim(call: Call) -> Tensor | None:
    """Takes, rolls or mirrors along some dimensions: nothing happens where the labels stay the same there."""
    x = call.first()
    dims = call.arguments.get("dim", call.arguments.get("dims"))
    if any(x.values.size(d) > 1 for d in _dims(dims, len(x.shape))):
        return _moved(call)
    for each in call.inputs[1:]:
        _places(call, each)
    return x.values


def _padded(call: Call) -> Tensor | None:
    x, pad = call.first(), call.arguments["pad"]
    dims = [len(x.shape) - 1 - i for i in range(len(pad) // 2)]
    return _moved(call) if any(x.values.size(d) > 1 for d in dims) else x.values


def _repeated(call: Call) -> Tensor:
    x = call.first()
    repeats = call.arguments["repeats"]
    values = x.values.reshape((1,) * (len(repeats) - len(x.shape)) + tuple(x.values.shape))
    return values.repeat([n if values.size(d) > 1 else 1 for d, n in enumerate(repeats)])


def _gated(call: Call) -> Tensor:
    """``glu``: the first half times a gate from the second."""
    x = call.first()
    dim = call.arguments["dim"] % len(x.shape)
    if x.values.size(dim) == 1:
        return x.values
    shape = tuple(call.out.shape)
    return call.sets.combine([Labels(half, shape) for half in x.values.chunk(2, dim)], len(shape))


def _index_add(call: Call) -> Tensor | None:
    x, source = call.of("self"), call.of("source")
    dim = call.arguments["dim"] % len(x.shape)
    if x.values.size(dim) > 1 or source.values.size(dim) > 1:
        return None
    _places(call, call.arguments["index"])
    rows = Labels(source.values, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    return call.sets.combine([x, rows], len(x.shape))


_PLACES_ONLY = {
    *("index", "take", "embedding", "masked_select", "roll", "flip", "index_select", "gather"),
    *("constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diag_embed"),
}
_NAMES: dict[Rule, str] = {
    pointwise: """
        hardswish log_sigmoid_forward _prelu_kernel rrelu_with_noise floor_divide polar complex rsub
        masked_fill where pow""",
    _copied: "copy",
    _constant: """
        zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty rand_like randn_like
        zero fill bernoulli normal uniform exponential""",
    _cat: "cat",
    _stack: "stack",
    _gated: "glu",
    _padded: "constant_pad_nd",
    _repeated: "repeat",
    _index_add: "index_add",
    _vector_product: "mv dot",
    _matmul: "mm bmm addmm baddbmm",
    _softmax: "_softmax _safe_softmax _log_softmax",
    _norm: "native_layer_norm _fused_rms_norm",
    _group_norm: "native_group_norm",
    _along_dim: "roll flip index_select gather",
    _same: """
        clone _to_copy contiguous tril triu lift lift_fresh lift_fresh_copy native_dropout detach_copy
        alias_copy _conj_physical resolve_conj""",
    reduction: """
        sum mean amax amin max min aminmax median mode prod norm linalg_vector_norm logsumexp argmax argmin
        any all cumsum cumprod cummax cummin logcumsumexp var std var_mean std_mean sort topk
        kthvalue nansum nanmedian count_nonzero""",
    _spatial: """
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d_with_indices max_pool3d_with_indices
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
        upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d
        reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d""",
    _moved: """
        index take embedding masked_select index_put _index_put_impl scatter select_scatter slice_scatter
        masked_scatter index_copy index_fill pixel_shuffle pixel_unshuffle channel_shuffle diag_embed""",
}
_RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
