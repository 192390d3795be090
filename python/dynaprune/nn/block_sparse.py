"""What the block-sparse layers share: values by slot, the dense view, loading of another structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from dynaprune.nn.compiled_writes import refuse_writes
from dynaprune.nn.dense_view import DenseView, dense_view
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune.nn.weight_reads import WeightReads
from dynaprune_kernels import BlockLayout
from dynaprune_kernels.averaged_slots import whole_slots
from dynaprune_kernels.ops.transforms import refuse_batch
from dynaprune_kernels.placement import moved
from dynaprune_kernels.reference import chosen_blocks, dense_to_blocks, dense_weight

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_OWN_ATTRIBUTES = ("tap", "probe", "reads", "copy_watch", "_plain", "pad_before")
_NO_OTHER_WEIGHT = (
    "the weight of a block-sparse layer cannot be replaced, parametrized, normed or masked by another one: "
    "change it in place, or exclude the layer from pruning (or make it dense: dynaprune.swap_back)"
)


class _Parameters(dict[str, Any]):
    """A layer's parameters; says why there is no ``weight`` among them to whoever wants to take it out."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"{name}: {_NO_OTHER_WEIGHT}" if name == "weight" else name)

    def __delitem__(self, name: str) -> None:
        if name == "weight":
            self[name]
        super().__delitem__(name)


class BlockSparseLayer(nn.Module):
    """A layer whose weight is stored as blocks: ``values [capacity, bi, bo]`` under the live mask of
    ``layout``.

    Attributes:
        values: the trained Parameter; the very object that was the dense layer's ``weight``.
        bias: Parameter ``[out]`` or None.
        layout: slots, live mask and indices.
        tap: None, or the leaf whose gradient collects block statistics in backward (see
        ``dynaprune_kernels.ops``).
        probe: bool scalar; while true, ``tap`` also gets gradient norms of blocks that are not live.
        copy_watch: None, or what a pruner left here to notice copies of the layer; it has ``arrived(layer)``,
            ``updated(layer)`` and ``note(layer)``.
        reads: notices that the dense weight is built in every step.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    probe: Tensor
    copy_watch: Any = None

    _dense_type: Any

    def __init__(self, layout: BlockLayout, values: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._parameters = _Parameters(values=values, bias=bias)
        self._set_up(layout)

    def _set_up(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.tap: Tensor | None = None
        self.probe = torch.zeros((), dtype=torch.bool, device=self.values.device)
        self.reads = WeightReads()

    @classmethod
    def in_place_of(cls, layer: nn.Module, layout: BlockLayout) -> Any:
        """Turn a plain layer into this class: the same object, with its hooks and attributes.

        The data of ``weight``, which becomes ``values``, is the caller's to bring into the layout's form.
        """
        parameters = dict(layer._parameters)
        weight, bias = parameters.pop("weight"), parameters.pop("bias")
        layer.__class__ = cls
        assert isinstance(layer, BlockSparseLayer)
        layer._parameters = _Parameters(parameters, values=weight, bias=bias)
        layer._modules = dict(layer._modules)
        layer._set_up(layout)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparseLayer:
        watch = self.copy_watch
        untouched = watch is not None and not watch.updated(self)
        super()._apply(fn, recurse)
        if untouched:
            watch.note(self)
        was_meta = self.probe.is_meta
        self.probe = moved(self.probe, fn)
        if was_meta and not self.probe.is_meta:
            self.probe.zero_()
        if self.tap is not None and (self.tap.device, self.tap.dtype) != self._tap_kind():
            self.renew_tap_()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "probe" in self._buffers:  # pickled when it was a buffer
            self.__dict__["probe"] = self._buffers.pop("probe")
            self._non_persistent_buffers_set.discard("probe")
        if self.copy_watch is not None:
            self.copy_watch.arrived(self)
        self.__dict__.setdefault("reads", WeightReads())

    def _refuse_constant(self) -> None:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        if get_proxy_mode() is None:
            raise RuntimeError(
                f"the weight of layer {self.reads.name or '(unnamed)'} is read while torch.fx.symbolic_trace "
                "runs, whose graph would keep a copy: use torch.export, or plain layers (dynaprune.swap_back)"
            )

    @property
    def weight(self) -> Tensor:
        """The dense weight of the live blocks; gradients and in-place changes reach ``values``.

        It is built when an op needs it, not by its shape, dtype, device or ``requires_grad``. Under
        ``torch.compile``, ``torch.func`` and forward-mode differentiation it is the dense tensor itself, for
        reading: compiled code that changes it is refused.
        """
        if torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime

            dense = self._dense(self.values)
            comptime(refuse_writes)
            return dense
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            refuse_batch(self.values)
            return self._dense(self.values)
        if is_fx_symbolic_tracing():
            self._refuse_constant()
        return dense_view(self)

    @weight.setter
    def weight(self, _: Any) -> None:
        raise AttributeError(_NO_OTHER_WEIGHT)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``'s, but the weight cannot be replaced or wrapped by another one."""
        if name.split("_")[0] == "weight" or isinstance(param, DenseView):
            raise AttributeError(_NO_OTHER_WEIGHT)
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> Any:
        name = self.reads.name or type(self).__name__
        raise RuntimeError(
            f"torch.jit.script cannot compile the block-sparse layer {name}: use torch.export or "
            "torch.jit.trace, or give the model plain layers (dynaprune.swap_back, pruner.finalize)"
        )

    def to_blocks(self, weight: Tensor) -> Tensor:
        """Cut a tensor shaped like the dense weight into ``[rows * columns, bi, bo]``, in block order."""
        return dense_to_blocks(weight, self.layout.block, self.layout.conv)

    def to_slots(self, weight: Tensor) -> Tensor:
        """Cut a tensor shaped like the dense weight into ``[capacity, bi, bo]``; free slots get zeros."""
        return self.layout.by_slot(self.to_blocks(weight))

    def listed_slots(self, weight: Tensor) -> Tensor:
        """:meth:`to_slots` with zeros in suspended slots as well: a gradient in the form that ops give it."""
        return self.to_slots(weight) * self._listed()

    def write_slots_(self, stored: Tensor, weight: Tensor) -> None:
        """Bring a dense ``weight`` into the live blocks of ``stored [capacity, bi, bo]``, in place."""
        stored.copy_(torch.where(self._listed(), self.to_slots(weight), stored))

    def _listed(self) -> Tensor:
        block = self.layout.block_of_slot.long()
        live = self.layout.mask.reshape(-1)[block.clamp(min=0)] & (block >= 0)
        return live.view(-1, 1, 1)

    def to_dense_shape(self, by_slot: Tensor) -> Tensor:
        """Inverse of :meth:`to_slots` at live blocks, zeros elsewhere: of values, gradients or states."""
        return self._dense(by_slot.detach())

    def _dense(self, by_slot: Tensor) -> Tensor:
        layout = self.layout
        in_features = layout.in_features // layout.groups
        dense = dense_weight(by_slot, layout.index, layout.out_features, in_features, layout.conv)
        return self._dense_view(dense)

    def _dense_view(self, dense: Tensor) -> Tensor:
        return dense

    def dense_shape(self) -> torch.Size:
        """Shape of the dense weight."""
        raise NotImplementedError

    def dense_stride(self) -> tuple[int, ...]:
        """Strides of the dense weight: contiguous."""
        shape = self.dense_shape()
        return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def live_values(self) -> int:
        """Number of weights of live blocks that lie inside the dense weight; syncs."""
        ones = torch.ones_like(self.values, dtype=torch.float32)
        return int(self.to_dense_shape(ones).sum(dtype=torch.float64).item())

    def density(self) -> float:
        """Live blocks over all blocks; syncs."""
        return self.layout.density()

    def enable_tap_(self, *, inputs: bool = False) -> Tensor:
        """Create the leaf that collects block statistics in backward and return it; see ``tap``.

        Args:
            inputs: while :attr:`probe` is true also collect the mean square of the inputs of every block.
        """
        device, dtype = self._tap_kind()
        rows = 3 if inputs else 2
        self.tap = torch.zeros(rows, self.layout.blocks, dtype=dtype, device=device, requires_grad=True)
        return self.tap

    def renew_tap_(self) -> None:
        """Fit the tap, where there is one, to the blocks, the device and the dtype that there are now."""
        if self.tap is not None:
            self.enable_tap_(inputs=self.tap.shape[0] > 2)

    def _tap_kind(self) -> tuple[torch.device, torch.dtype]:
        dtype = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        return self.values.device, dtype

    def disable_tap_(self) -> None:
        """Stop collecting block statistics."""
        self.tap = None

    def to_dense(self) -> nn.Module:
        """Become the plain layer of the same function: the same object, with its hooks and attributes.

        ``values`` becomes its ``weight``, the same Parameter.
        """
        weight, grad = self.to_dense_shape(self.values), self.values.grad
        replace_parameter_data_(self.values, weight, None if grad is None else self.to_dense_shape(grad))
        self.turn_plain_(self.values)
        return self

    def turn_plain_(self, weight: nn.Parameter) -> None:
        """Take the plain class, with the dense ``weight``; what attributes refer to stays as it is."""
        plain = self._plain_layer()
        parameters = {k: v for k, v in self._parameters.items() if k not in ("values", "bias")}
        parameters = {**parameters, "weight": weight, "bias": self.bias}
        self._parameters = parameters
        self._modules = {k: v for k, v in self._modules.items() if k != "layout"}
        for name in _OWN_ATTRIBUTES:
            self.__dict__.pop(name, None)
        self.__dict__.update({k: v for k, v in plain.__dict__.items() if k not in _OF_EVERY_MODULE})
        self.__class__ = type(plain)  # type: ignore[assignment]

    def _plain_layer(self) -> nn.Module:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as the plain layer does; dead blocks stay dead."""
        self._dense_type.reset_parameters(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        """Resize to the structure found in ``state_dict`` before its tensors are copied."""
        values = state_dict.get(f"{prefix}values")
        key = f"{prefix}layout.slot_of_block"
        slots = state_dict.get(key)
        if isinstance(values, Tensor):
            if values.dim() != 3 or values.shape[1:] != self.values.shape[1:]:
                raise ValueError(
                    f"expected {prefix}values of shape (slots, {self.values.shape[1]}, "
                    f"{self.values.shape[2]}), got {tuple(values.shape)}: "
                    f"the checkpoint was made with another block size"
                )
            if isinstance(slots, Tensor):
                slots = whole_slots(slots, values, self.layout.known_slots, self.layout.capacity)
                state_dict[key] = slots
                self._take_structure(slots, values, assign=local_metadata.get("assign_to_params_buffers"))
            elif values.shape != self.values.shape:
                raise ValueError(
                    f"expected {prefix}values with the {self.layout.capacity} slots that the layer has now, "
                    f"got {values.shape[0]}, and no {key} that says of which blocks: "
                    "a copy of the weights that fell behind; let it follow (pruner.follow) once made"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _take_structure(self, slots: Tensor, values: Tensor, *, assign: bool | None) -> None:
        if assign and self.values.device != values.device:
            self.layout.to_empty(device=values.device)
            self.probe = torch.zeros_like(self.probe, device=values.device)
        self.layout.restore_(slots, values.shape[0])
        if values.shape != self.values.shape:
            replace_parameter_data_(self.values, self.values.new_empty(values.shape))


def as_one_node(layer: BlockSparseLayer, x: Proxy) -> Any:
    """``layer`` in a graph of ``torch.fx.symbolic_trace``: one node, as a layer of torch's own is."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {})


def as_it_is(layer: BlockSparseLayer) -> BlockSparseLayer:
    """A block-sparse layer around the same tensors, for looking at after ``layer`` has become dense."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    twin._parameters, twin._modules = dict(layer._parameters), dict(layer._modules)
    return twin


def take_over_weight(weight: nn.Parameter, layout: BlockLayout) -> None:
    """Turn the data (and gradient) of a dense layer's Parameter into the blocks of ``layout``, in place."""

    def by_slot(dense: Tensor) -> Tensor:
        if layout.conv is not None and dense.dim() == 3:
            dense = dense.unsqueeze(2)
        numbers = layout.block_of_slot.long()
        blocks = chosen_blocks(dense.detach(), layout.block, layout.conv, numbers.clamp(min=0))
        return blocks.masked_fill_((numbers < 0).view(-1, 1, 1), 0)

    grad = None if weight.grad is None else by_slot(weight.grad)
    replace_parameter_data_(weight, by_slot(weight), grad)
