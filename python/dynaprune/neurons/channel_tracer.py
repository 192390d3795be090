"""Watches a model run and labels what every operation makes with the channels that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynaprune.neurons.channel_rules import Call, function_rule, rule_for
from dynaprune.neurons.channel_sets import NEUTRAL, ChannelSets, Labels, latest, uniform
from dynaprune.neurons.channel_storage import LabelStorage, storage_key
from dynaprune.neurons.surgery import cannot_cut
from dynaprune.nn.adapters import find_adapters

_SAME_EVERYWHERE = (
    *("zeros", "ones", "full", "empty", "new_", "scalar_tensor", "fill", "zero"),
    *("rand", "bernoulli", "normal", "uniform", "exponential"),
)
_INPUT, _CONSTANT = "an input of the model", "a constant"


@dataclass
class Layer:
    """A layer and the numbers of its channels: ``outputs``, and ``inputs`` where it has its own.

    ``called``: whether the forward pass called it.
    """

    name: str
    module: Any
    channelwise: bool
    outputs: Tensor
    inputs: Tensor
    called: bool = False


@dataclass
class DependencyGraph:
    """What a forward pass showed.

    ``unknown``: operations that could not be followed and met channels, with the module that they ran in.
    """

    layers: dict[str, Layer]
    sets: ChannelSets
    unknown: dict[str, str] = field(default_factory=dict)


def _tied_modules(model: nn.Module) -> set[int]:
    """Modules with a Parameter that another module holds too."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return {module for held in holders.values() if len(held) > 1 for module in held}


class ChannelTracer(TorchDispatchMode):
    """Labels the results of every operation while a model runs."""

    supports_higher_order_operators = True

    def __init__(self, graph: DependencyGraph, model: nn.Module) -> None:
        super().__init__()
        self.graph, self.sets = graph, graph.sets
        self.storage = LabelStorage(self.sets, self.sets.fixed(_INPUT))
        self._constant = self.sets.fixed(_CONSTANT)
        self._model = model
        self._within: list[tuple[str, nn.Module]] = [("", model)]
        self._aside = 0
        self._layer_of: dict[Any, Layer] = {}
        self._weights: dict[int, Layer] = {}
        for layer in graph.layers.values():
            for parameter in layer.module._parameters.values():
                if parameter is not None:
                    self._layer_of[storage_key(parameter)] = layer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Calls of layers and modules are noticed, and so are all operations between them."""
        tied = _tied_modules(self._model)
        adapters = find_adapters(self._model)
        with ExitStack() as stack:
            self._label_buffers()
            for name, reason in (adapters.bases | adapters.layers).items():
                if layer := self.graph.layers.get(name):  # also where the adapter is not active
                    for channels in (layer.outputs, layer.inputs):
                        self.sets.block(channels, f"{name!r} keeps its widths: {reason}")
            for name, module in self._model.named_modules():
                self._label_parameters(name, module)
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                if layer := self.graph.layers.get(name):
                    reason = cannot_cut(module)
                    reason = f"{name!r} is in the way: {reason}" if reason else ""
                    if id(module) in tied:
                        reason = f"{name!r} shares a weight with another layer"
                    module.forward = self._followed(layer, module.forward, reason)
                    stack.callback(module.__dict__.pop, "forward", None)
                else:
                    enter = module.register_forward_pre_hook(self._entering(name))
                    leave = module.register_forward_hook(self._leaving, always_call=True)
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            stack.enter_context(self)
            stack.enter_context(_WholeFunctions(self))
            yield

    def _label_buffers(self) -> None:
        for name, buffer in self._model.named_buffers():
            self.storage.write(buffer, uniform(self.sets.fixed(f"the buffer {name}"), buffer.shape).values)

    def _label_parameters(self, name: str, module: nn.Module) -> None:
        kind = type(module).__name__
        for key, parameter in module._parameters.items():
            if parameter is not None and (where := storage_key(parameter)) is not None:
                origin = f"the parameter {f'{name}.{key}' if name else key} ({kind}), which is no layer's"
                if where in self._layer_of:
                    origin = f"the weights of {name!r}"
                label = self.sets.fixed(origin)
                if where in self._layer_of:
                    self._weights[label] = self._layer_of[where]
                self.storage.write(parameter, uniform(label, parameter.shape).values)

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any) -> None:
            self._within.append((name, module))

        return hook

    def _leaving(self, module: nn.Module, *_: Any) -> None:
        while len(self._within) > 1 and self._within.pop()[1] is not module:
            pass

    def _followed(self, layer: Layer, forward: Callable[..., Any], reason: str) -> Callable[..., Any]:
        def followed(*args: Any, **kwargs: Any) -> Any:
            with self.unwatched():
                out = forward(*args, **kwargs)
                x = (args or tuple(kwargs.values()))[0]
                self._layer_called(layer, x, out, reason)
            return out

        return followed

    def _layer_called(self, layer: Layer, x: Tensor, out: Tensor, reason: str) -> None:
        layer.called = True
        dim, labels = _feature_dim(layer.module, x), self.storage.read(x)
        channels = layer.outputs if layer.channelwise else layer.inputs
        if reason:
            for each in (labels.values, layer.outputs, layer.inputs):
                self.sets.block(each, reason)
        if not labels.dyed:
            self._hold(channels, labels.fixed())
            if layer.channelwise:
                self.storage.write(out, uniform(labels.fixed(), out.shape).values)
                return
        elif labels.values.size(dim) == 1 and x.size(dim) > 1:
            self.sets.block(labels.values, f"{layer.name!r} works along another dimension than theirs")
            self._hold(channels, self.sets.fixed(f"{layer.name!r}"))
        else:
            self._join(channels, labels.values.movedim(dim, -1).reshape(-1, x.size(dim)))
        shape = [1] * out.dim()
        shape[dim] = -1
        self.storage.write(out, layer.outputs.int().reshape(shape))

    def _join(self, channels: Tensor, rows: Tensor) -> None:
        """Input i of a layer is what ``rows[:, i]`` says."""
        self.sets.work += rows.numel()
        mine = channels.expand_as(rows)
        dyed = rows >= 0
        self.sets.unite(mine[dyed], rows[dyed])
        held = ~dyed & (rows != NEUTRAL)
        if bool(held.any()):
            self._hold(mine[held], int(rows[held].max()))

    def _hold(self, channels: Tensor, label: int) -> None:
        if label != NEUTRAL:
            self.sets.block(channels, f"its outputs meet {self.sets.origin(label)}")

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """What runs inside is somebody else's to label."""
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1

    def follow_function(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run a function of torch as one operation where it has a rule, else as the operators inside it."""
        rule = None if self._aside else function_rule(function, args, kwargs)
        if rule is None:
            return function(*args, **kwargs)
        with self.unwatched():
            out = function(*args, **kwargs)
        name, arguments, apply = rule
        inputs = _tensors(arguments)
        labels = [self.storage.read(each) for each in inputs]
        self._weights_read(inputs, labels)
        if any(each.dyed for each in labels):
            call = Call(name, function, arguments, inputs, out, self.sets, self.storage.read, self._why)
            values = apply(call)
            if values is None or not _fits(values, out):
                self._give_up(name, inputs, [out])
            else:
                self.storage.write(out, values)
        else:
            label = latest(each.fixed() for each in labels)
            self.storage.write(out, uniform(self._constant if label == NEUTRAL else label, out.shape).values)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            out = func(*args, **kwargs)
            self._give_up(str(func), _tensors((args, kwargs)), _tensors(out))
            return out
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if torch.Tag.inplace_view in func.tags:
            return
        arguments = _by_name(func, args, kwargs)
        inputs = _tensors((args, kwargs))
        changed = [
            tensor
            for each in func._schema.arguments
            if each.alias_info is not None and each.alias_info.is_write
            for tensor in _tensors(arguments[each.name])
        ]
        held = {storage_key(each) for each in inputs}
        outs = [each for each in _tensors(out) if storage_key(each) not in held]
        name = func._schema.name.removeprefix("aten::")
        name = name.removesuffix("_") if changed else name
        targets = changed or outs
        if not targets:
            if not _tensors(out):
                self._give_up(name, inputs, [])
            return
        labels = [self.storage.read(each) for each in inputs]
        self._weights_read(inputs, labels)
        if not any(each.dyed for each in labels):
            self._plain(func, name, labels, targets)
            return
        rule = rule_for(func, name)
        call = Call(name, func, arguments, inputs, targets[0], self.sets, self.storage.read, self._why)
        try:
            values = rule(call) if rule else None
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            name, values = f"{name} ({type(error).__name__}: {str(error)[:80]})", None
        if values is None or not _fits(values, targets[0]):
            self._give_up(name, inputs, targets)
            return
        for each in targets:
            fallback = uniform(self.sets.fixed(f"a result of {name}"), each.shape).values
            self.storage.write(each, values if _fits(values, each) else fallback)

    def _plain(self, func: Any, name: str, labels: list[Labels], targets: list[Tensor]) -> None:
        """No channel is involved."""
        known = [each.fixed() for each in labels if each.shape != ()]
        constant = all(label == NEUTRAL for label in known)
        same = name.startswith(_SAME_EVERYWHERE) or (bool(known) and torch.Tag.pointwise in func.tags)
        for target in targets:
            label = latest(known)
            if constant:
                whole = target.untyped_storage().nbytes() == target.numel() * target.element_size()
                label = NEUTRAL if same and whole else self._constant
            self.storage.write(target, uniform(label, target.shape).values)

    def _give_up(self, name: str, inputs: list[Tensor], outs: list[Tensor]) -> None:
        """Block the channels that meet an operation without a rule."""
        labels = [self.storage.read(each) for each in inputs]
        if any(each.dyed for each in labels):
            self.graph.unknown.setdefault(name, self._within[-1][0])
            for each in labels:
                self.sets.block(each.values, self._why(f"{name} cannot be followed"))
        for out in outs:
            self.storage.write(out, uniform(self.sets.fixed(f"a result of {name}"), out.shape).values)

    def _weights_read(self, inputs: list[Tensor], labels: list[Labels]) -> None:
        """A layer whose weights meet something outside its forward pass keeps its width.

        To look at them alone (for their dtype, as a dense view) does no harm.
        """
        met = {x.fixed() for t, x in zip(inputs, labels, strict=True) if t.is_floating_point() and t.dim()}
        weights = met & self._weights.keys()
        if len(met - {NEUTRAL, self._constant}) < 2 and not (weights and any(x.dyed for x in labels)):
            return
        for label in weights:
            layer = self._weights[label]
            reason = f"the weights of {layer.name!r} are read outside its forward pass: {self._where()}"
            for each in (layer.outputs, layer.inputs):
                self.sets.block(each, reason)

    def _where(self) -> str:
        name, module = self._within[-1]
        return f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"

    def _why(self, detail: str) -> str:
        reason = cannot_cut(self._within[-1][1])
        if reason and not reason.startswith("layers of type"):
            detail = reason
        return f"{self._where()} is in the way: {detail}"


class _WholeFunctions(TorchFunctionMode):
    """Products of batches of matrices, and attention: heads and samples stay dimensions of their own."""

    def __init__(self, tracer: ChannelTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tracer.follow_function(func, args, kwargs or {})


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _fits(values: Tensor, tensor: Tensor) -> bool:
    return values.dim() == tensor.dim() and all(
        n in (1, size) for n, size in zip(values.shape, tensor.shape, strict=True)
    )


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, defaults included."""
    found = {}
    for place, each in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(each.name, each.default_value)
        found[each.name] = given
    return found


def _feature_dim(module: Any, x: Tensor) -> int:
    """Which dimension of its input a layer takes as channels."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.PReLU):
        return 1
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return x.dim() - 1 - next(int(c) for c in type(module).__name__ if c.isdigit())
    kernel = getattr(module, "kernel_size", ())
    return x.dim() - 1 - len(kernel)
