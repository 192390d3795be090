"""The dense weight of a block-sparse layer as a tensor: built when an op needs it, with gradient, writable.

``layer.weight`` is a :class:`DenseView`. It knows its shape, dtype and device without being built. The first
op builds it from the live blocks; gradients go on to ``values``; an in-place change, of the view or of a view
of it, is written back to the live blocks (dead ones stay dead), or raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynaprune.nn.adapters import merging_adapter
from dynaprune.nn.weight_reads import WeightReads
from dynaprune_kernels import BlockLayout


class Blocks(Protocol):
    """A layer that keeps the blocks of a weight, and turns tensors by slot into the dense shape and back."""

    values: nn.Parameter
    layout: BlockLayout
    reads: WeightReads

    def dense_shape(self) -> torch.Size: ...

    def dense_stride(self) -> tuple[int, ...]: ...

    def to_dense_shape(self, by_slot: Tensor) -> Tensor: ...

    def to_slots(self, dense: Tensor) -> Tensor: ...

    def listed_slots(self, dense: Tensor) -> Tensor: ...

    def write_slots_(self, by_slot: Tensor, dense: Tensor) -> None: ...


class _Source:
    """What a family of views shows: a layer's values or their gradient, built at most once per change."""

    def __init__(self, layer: Blocks, stored: Tensor, reads: WeightReads | None) -> None:
        self.layer = layer
        self._stored = stored
        self._reads = reads
        self._built: Tensor | None = None
        self._at: tuple[Any, ...] = ()
        self.shape, self.stride = layer.dense_shape(), layer.dense_stride()

    def dense(self) -> Tensor:
        """The dense tensor, up to date; inside backward as it was in forward."""
        if self._built is not None and torch._C._current_graph_task_id() != -1:
            return self._built
        if self.layer.dense_shape() != self.shape:
            raise RuntimeError(
                f"the weight of layer {self.layer.reads.name or '(unnamed)'} was read when its shape was "
                f"{tuple(self.shape)}, and is {tuple(self.layer.dense_shape())} now: read it again"
            )
        at = (self._stored._version, self._stored.data_ptr(), self.layer.layout.index._version)
        if self._built is None or at != self._at:
            with torch.no_grad():
                dense = self.layer.to_dense_shape(self._stored)
                if self._built is None:
                    if dense.stride() != self.stride:
                        dense = dense.new_empty_strided(self.shape, self.stride).copy_(dense)
                    self._built = dense
                else:
                    self._built.copy_(dense)
            self._at = at
            if self._reads is not None:
                self._reads.note(self._stored._version)
        return self._built

    def write(self) -> None:
        """Bring what was changed in place into the live blocks; what was written elsewhere is dropped."""
        assert self._built is not None
        adapter = merging_adapter(self.layer) if self._reads is not None else ""
        with torch.no_grad():
            if adapter and self._lost():
                self._built.copy_(self.layer.to_dense_shape(self._stored))
                raise RuntimeError(
                    f"{adapter} writes into removed blocks of layer {self.layer.reads.name or '(unnamed)'}: "
                    "the merged layer would lose part of the adapter. Make the layer dense first "
                    "(pruner.finalize() or dynaprune.swap_back), then merge"
                )
            self.layer.write_slots_(self._stored, self._built)
            self._built.copy_(self.layer.to_dense_shape(self._stored))
        self._at = (self._stored._version, self._stored.data_ptr(), self.layer.layout.index._version)

    def _lost(self) -> bool:
        """Whether there is anything in blocks that are not live."""
        assert self._built is not None
        live = self.layer.to_dense_shape(torch.ones_like(self._stored))
        return bool(((self._built != 0) & (live == 0)).any())


class DenseView(Tensor):
    """A dense tensor that stands for the blocks of a layer; see the module's text.

    ``grad``, ``requires_grad`` and gradient hooks of ``layer.weight`` are those of the layer's ``values``.
    """

    _source: _Source
    _inner: Tensor | None
    _is_param: bool

    @staticmethod
    def _make(source: _Source, inner: Tensor | None = None, *, parameter: bool = False) -> DenseView:
        like = source._stored
        shape, stride = (source.shape, source.stride) if inner is None else (inner.shape, inner.stride())
        offset = 0 if inner is None else inner.storage_offset()
        view = Tensor._make_wrapper_subclass(
            DenseView,
            shape,
            strides=stride,
            storage_offset=offset,
            dtype=like.dtype if inner is None else inner.dtype,
            device=like.device,
        )
        view._source, view._inner, view._is_param = source, inner, parameter
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def _plain(self) -> Tensor:
        dense = self._source.dense()
        return dense if self._inner is None else self._inner

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = list(_written(func, args, kwargs))
        for view in written:
            _refuse_write(view, func)
        plain_args, plain_kwargs = tree_map(_unwrapped, args), tree_map(_unwrapped, kwargs)
        out = func(*plain_args, **plain_kwargs)
        for source in {id(view._source): view._source for view in written}.values():
            source.write()
        if not any(each.alias_info is not None for each in func._schema.returns):
            return out
        views = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DenseView)]
        return tree_map(functools.partial(_as_view, views=views), out)

    @property
    def requires_grad(self) -> bool:
        return self._source._stored.requires_grad if self._is_param else _REQUIRES_GRAD.__get__(self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Let ``values`` require gradients, or not."""
        if not self._is_param:
            return super().requires_grad_(requires_grad)
        self._source._stored.requires_grad_(requires_grad)
        return self

    @property
    def grad(self) -> Tensor | None:
        """The dense gradient, of the live blocks; changing it in place changes ``values.grad``."""
        if not self._is_param:
            return _GRAD.__get__(self)
        grad = self._source._stored.grad
        return None if grad is None else DenseView._make(_Source(self._source.layer, grad, None))

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        stored = self._source._stored
        if value is not None:
            _check_like(value, self, "gradient")
            value = self._source.layer.to_slots(_unwrapped(value)).to(stored.dtype)
        stored.grad = value

    @property
    def data(self) -> Tensor:
        """The same weight, outside of autograd: changes arrive in ``values``."""
        return DenseView._make(self._source, self._inner)

    @data.setter
    def data(self, value: Tensor) -> None:
        _check_like(value, self, "weight")
        with torch.no_grad():
            self.data.copy_(value)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Call ``hook`` with the dense gradient, whenever that of ``values`` is computed."""
        if not self._is_param:
            return super().register_hook(hook)
        layer = self._source.layer

        def by_slot(grad: Tensor) -> Tensor | None:
            changed = hook(layer.to_dense_shape(grad))
            return None if changed is None else layer.to_slots(_unwrapped(changed))

        return self._source._stored.register_hook(by_slot)

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        raise RuntimeError(
            "a block-sparse weight takes no hook after its gradient: register it on the layer's `values`"
        )

    def retain_grad(self) -> None:
        """The gradient is kept anyway."""

    def data_ptr(self) -> int:
        return self._plain().data_ptr()

    def tolist(self) -> Any:
        return self._plain().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array; writing to it would not reach the layer."""
        if self.requires_grad and not force and (self._is_param or _REQUIRES_GRAD.__get__(self)):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy()")
        array = self._plain().detach().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("a block-sparse weight has no dense memory to share: use weight.detach().clone()")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = self._plain().clone()
        return nn.Parameter(copy, self.requires_grad) if self._is_param else copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DenseView of {self._source.layer.reads.name or 'a layer'}:\n{self._plain()!r}"


_REQUIRES_GRAD: Any = torch._C.TensorBase.requires_grad
_GRAD: Any = torch._C.TensorBase.grad


class _Dense(torch.autograd.Function):
    """``values`` to the (unbuilt) dense weight, and the dense gradient back to ``values``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: Blocks, source: _Source) -> DenseView:
        ctx.layer = layer
        return DenseView._make(source, parameter=True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.layer.listed_slots(_unwrapped(grads[0])), None, None


def dense_view(layer: Blocks) -> Tensor:
    """The weight of ``layer`` as a dense tensor that gradients and in-place changes pass through."""
    source = _Source(layer, layer.values, layer.reads)
    return _Dense.apply(layer.values, layer, source)


def _unwrapped(value: Any) -> Any:
    return value._plain() if isinstance(value, DenseView) else value


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[DenseView]:
    """The views that ``func`` changes in place."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, DenseView))


def _refuse_write(view: DenseView, func: Any) -> None:
    if torch.Tag.inplace_view in func.tags or func._schema.name in ("aten::set_", "aten::resize_"):
        raise RuntimeError(
            f"{func._schema.name} would give a block-sparse weight other memory or another shape: change its "
            "elements in place, or make the layer dense first (dynaprune.swap_back)"
        )
    if torch.is_grad_enabled() and _REQUIRES_GRAD.__get__(view):
        raise RuntimeError(
            "a block-sparse weight that requires grad is being changed in place: do it under torch.no_grad()"
        )


def _as_view(value: Any, views: list[DenseView]) -> Any:
    if not isinstance(value, Tensor):
        return value
    for view in views:
        if view._plain() is value:
            return view
    for view in views:
        if value.untyped_storage()._cdata == view._plain().untyped_storage()._cdata:
            return DenseView._make(view._source, value)
    return value


def _check_like(value: Any, view: Tensor, what: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a {what} as a tensor, got {type(value).__name__}")
    if value.shape != view.shape or value.device != view.device or value.dtype != view.dtype:
        raise ValueError(
            f"expected a {what} like the block-sparse weight, {tuple(view.shape)} {view.dtype} on "
            f"{view.device}, got {tuple(value.shape)} {value.dtype} on {value.device}"
        )
