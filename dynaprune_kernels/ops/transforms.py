"""The ops under ``torch.func`` and in forward-mode differentiation.

``torch.func`` looks for a kernel under a dispatch key of its own before any other, so ordinary calls pay
nothing for it. Derivatives of every order follow from one rule: the matrix ops are linear in each of their
first two operands, and their gradients are again such ops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_OVER_VALUES = (
    "block-sparse layers do not run under vmap over their values (an ensemble by stack_module_state, weights "
    "adapted per task): each model has a live mask of its own, and there is one layout for all. Loop over "
    "the models, or give them plain layers (dynaprune.swap_back, pruner.finalize)"
)
_FUNCTIONALIZED = (
    "block-sparse layers do not run under torch.func.functionalize: use torch.export or torch.compile, which "
    "functionalize without it, or plain layers (dynaprune.swap_back, pruner.finalize)"
)
# What takes no part in the product of the first two operands.
_BESIDE_THE_PRODUCT = ("bias", "tap", "probe")

_thread = threading.local()


@contextmanager
def of_directions() -> Iterator[None]:
    """While entered, in this thread, ``values`` may be a batch: directions, under the layer's own mask."""
    before = getattr(_thread, "directions", False)
    _thread.directions = True
    try:
        yield
    finally:
        _thread.directions = before


def transformable(
    op: Any, backward: Callable[..., Any], setup: Callable[..., None] | None
) -> Callable[..., Any]:
    """``op`` in a form that every transform of ``torch.func`` and every dual tensor can go through.

    Args:
        backward, setup: as for ``registration.autograd``; without ``setup`` the op has no derivative.

    Raises (the function returned):
        RuntimeError: vmap over the values of a layer, ``functionalize``.
    """
    name = op._schema.name
    arguments = [argument.name for argument in op._schema.arguments]
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def forward(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        # The reference may answer with a view of what it computed; forward mode takes it for one of an input.
        return output.clone() if isinstance(output, Tensor) and output._is_view() else output

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if setup is not None:
            setup(ctx, inputs, output)
            _save_for_tangents(ctx, inputs, output)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        if setup is None:
            raise RuntimeError(f"{name} has no derivative: it is a statistic, detach its inputs")
        return _tangent(op, arguments, ctx, tangents)

    def vmap(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        batched = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and dims[i] is not None]
        moved = [x.movedim(dims[i], 0) if i in batched else x for i, x in enumerate(inputs)]
        if batched == [0] and arguments[1] == "values":
            return _in_one_call(op, arguments, moved), 0
        return _one_by_one(op, moved, batched, info.batch_size)

    members = {"forward": forward, "setup_context": setup_context, "backward": backward}
    members |= {"jvp": jvp, "vmap": vmap}
    function: Any = type(
        f"{name.removeprefix('dynaprune::')}_transformable",
        (torch.autograd.Function,),
        {key: staticmethod(member) for key, member in members.items()},
    )
    of_layer = arguments[:2] == ["x", "values"]

    def call(*given: Any) -> Any:
        if of_layer and not getattr(_thread, "directions", False):
            refuse_batch(given[1])
        if _functionalizes():
            raise RuntimeError(_FUNCTIONALIZED)
        return function.apply(*given, *defaults[len(given) :])

    return call


def _save_for_tangents(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.output_shape = output.shape
    ctx.save_for_forward(*(inputs[i] for i in ctx.places))


def _tangent(op: Any, arguments: Sequence[str], ctx: Any, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """``op(da, b) + op(a, db) + d bias`` for the first two operands ``a`` and ``b``."""
    inputs = list(ctx.others)
    for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
        if arguments[place] not in _BESIDE_THE_PRODUCT:
            inputs[place] = saved
    terms = []
    with of_directions():
        for place in (0, 1):
            if tangents[place] is not None:
                terms.append(op(*inputs[:place], tangents[place], *inputs[place + 1 :]))
    bias = tangents[arguments.index("bias")] if "bias" in arguments else None
    if bias is not None:
        trailing = [1] * (len(ctx.output_shape) - 2)
        terms.append(bias.view(-1, *trailing).expand(ctx.output_shape))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _in_one_call(op: Any, arguments: Sequence[str], inputs: list[Any]) -> Tensor:
    """A batch of batches ``[b, n, ...]`` of the first operand as one batch."""
    size, rest = inputs[0].shape[:2], inputs[1:]
    if "input_size" in arguments:
        at = arguments.index("input_size") - 1
        rest[at] = [size.numel(), *rest[at][1:]]
    return op(inputs[0].flatten(0, 1), *rest).unflatten(0, size)


def _one_by_one(op: Any, inputs: list[Any], batched: list[int], size: int) -> tuple[Any, Any]:
    def part(x: Tensor, n: int) -> Tensor:
        return x[n] if x.dim() == 5 else x[n].contiguous()  # images keep their memory format

    each = [op(*(part(x, n) if i in batched else x for i, x in enumerate(inputs))) for n in range(size)]
    if isinstance(each[0], Tensor):
        return torch.stack(each), 0
    return tuple(torch.stack(part) for part in zip(*each, strict=True)), (0,) * len(each[0])


def refuse_batch(values: Tensor) -> None:
    """Raise RuntimeError where a layer's ``values`` are a batch that vmap goes over."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(values):
        if functorch.is_batchedtensor(values):
            raise RuntimeError(_OVER_VALUES)
        values = functorch.get_unwrapped(values)


def _functionalizes() -> bool:
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Functionalize for level in stack)
