"""Which layers' weights are read by other code than the layer's own forward, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_ABOUT_A_TENSOR = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "requires_grad",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_leaf",
        "layout",
        "is_quantized",
        "is_sparse",
        "names",
        "itemsize",
        "nbytes",
        "grad_fn",
        "_backward_hooks",
    )
    if hasattr(Tensor, name)
} | {
    getattr(Tensor, name)
    for name in (
        "size",
        "dim",
        "numel",
        "nelement",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "stride",
        "element_size",
        "get_device",
        "__len__",
        "requires_grad_",
        "type",
    )
}


class _Reads(TorchFunctionMode):
    """Notes each function that gets one of ``weights`` while the layer it belongs to does not run."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.running: list[str] = []
        self.within: list[str] = []
        self.readers: dict[str, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _ABOUT_A_TENSOR:
            for leaf in tree_leaves((args, kwargs)):
                name = self.weights.get(_storage(leaf)) if isinstance(leaf, Tensor) else None
                if name is not None and name not in self.running:
                    reader = self.within[-1] if self.within else "the model"
                    self.readers.setdefault(name, f"its weight is read by {reader} directly")
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return 0
        return tensor.untyped_storage()._cdata


@contextmanager
def watched_reads(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, str]]:
    """Inside, notice who reads the plain ``weight`` of ``layers`` apart from their own forward.

    Yields:
        The reasons by layer name, which fill as the model runs.
    """
    weights: dict[int, str] = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is not None and (where := _storage(weight)):
            weights.setdefault(where, name)
    reads = _Reads(weights)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in layers:
                if "forward" not in vars(module):
                    module.forward = _noted(name, module.forward, reads.running)
                    stack.callback(module.__dict__.pop, "forward", None)
                continue
            if isinstance(module, torch.jit.ScriptModule):
                continue
            enter = module.register_forward_pre_hook(_entering(type(module).__name__, reads.within))
            leave = module.register_forward_hook(_leaving(reads.within), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(reads)
        yield reads.readers


def _noted(name: str, forward: Callable[..., Any], running: list[str]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        running.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            running.pop()

    return noted


def _entering(name: str, within: list[str]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        within.append(name)

    return hook


def _leaving(within: list[str]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if within:
            within.pop()

    return hook
