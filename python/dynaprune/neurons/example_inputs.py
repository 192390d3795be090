"""One forward pass to repeat: its arguments, how they are caught, and the tensors in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dynaprune.nn.calibration_mode import uncompiled


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of one forward pass: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> ExampleInputs:
        """A tensor: the only argument; a tuple or list: positional ones; a mapping: keyword arguments."""
        if isinstance(value, ExampleInputs):
            return value
        if isinstance(value, Mapping):
            return cls((), dict(value))
        return cls(tuple(value) if isinstance(value, (tuple, list)) else (value,))

    def forward(self, model: nn.Module) -> Any:
        """Run ``model``, uncompiled where it was compiled: hooks and traces see every layer."""
        with uncompiled():
            return model(*self.args, **self.kwargs)


class InputCapture:
    """Takes the arguments of the model's next training forward, by a hook that removes itself.

    ``example`` is None until then; set it to None when the batch is no longer needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle: Any = None
        self.example: ExampleInputs | None = None

    def arm(self) -> None:
        """Capture at the next forward in training mode."""
        if self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._take, with_kwargs=True)

    def remove(self) -> None:
        """Stop capturing and let go of what was captured."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self.example = None

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self._handle.remove()
            self._handle = None
            self.example = ExampleInputs(detached(args), detached(kwargs))


def detached(value: Any) -> Any:
    """``value`` with every tensor in nested tuples, lists and dicts detached."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(detached(v) for v in value)
    if type(value) is dict:
        return {k: detached(v) for k, v in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    return []
