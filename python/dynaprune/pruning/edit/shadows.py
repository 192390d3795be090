"""Averages that are no modules: a dict or a list of tensors, one for each parameter or state dict entry."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from dynaprune.nn import BlockSparseLayer, swap_back
from dynaprune.nn.parameter import replace_parameter_data_
from dynaprune.pruning.edit.stale_copies import CopyWatch, same_structure
from dynaprune.saving.manifest import structure_manifest
from dynaprune.saving.reshape import own_state

_Tensors = MutableMapping[Any, Any] | Sequence[Any]
_PREFIXES = ("", "module.", "_orig_mod.")
_WEIGHT, _VALUES, _SLOTS = "weight", "values", "layout.slot_of_block"


class Shadow:
    """A dict or list of tensors that follows, by way of a deep copy of the model that stands in for it.

    While the model's structure changes, the stand-in holds the tensors; whatever happens to it then is what
    happens to any copy. Between, the container may get other tensors.

    Attributes:
        stand_in: the deep copy.
    """

    def __init__(
        self,
        tensors: _Tensors,
        model: nn.Module,
        layers: Mapping[str, BlockSparseLayer],
    ) -> None:
        """Find out which tensor mirrors what.

        Raises:
            TypeError: something else among the tensors. ValueError: what mirrors no model of this structure.
        """
        self._tensors = tensors
        self._names = _names(tensors, model, layers)
        for key, name in list(self._names.items()):
            layer, _, last = name.rpartition(".")
            if layer in layers and last == _WEIGHT:
                self._names[key] = f"{layer}.{_VALUES}"
                self._tensor(key).data = layers[layer].to_slots(self._tensor(key).detach())
        if isinstance(tensors, MutableMapping):
            self._rename(_VALUES, layers, was=_WEIGHT)
        self._check_shapes(model)
        self.stand_in = _stand_in(model)

    def _tensor(self, key: Any) -> Tensor:
        tensor = self._tensors[key]
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected tensors in a copy that follows, got {type(tensor).__name__} at {key!r}"
            )
        return tensor

    def _check_shapes(self, model: nn.Module) -> None:
        mine = own_state(model)
        for key, name in self._names.items():
            tensor = self._tensor(key)
            if tensor.shape != mine[name].shape:
                raise ValueError(
                    f"expected {key!r} of shape {tuple(mine[name].shape)}, which {name} of the model has "
                    f"now, got {tuple(tensor.shape)}: let a copy follow right after making it"
                )

    def take_in(self, model: nn.Module, layers: Mapping[str, BlockSparseLayer]) -> None:
        """Let the stand-in hold the tensors, before the structure of ``model`` changes.

        Raises:
            ValueError: a tensor of another shape than the model's.
        """
        self._check_shapes(model)
        fits = structure_manifest(self.stand_in) == structure_manifest(model) and all(
            same_structure(self.layer(name), layer) for name, layer in layers.items()
        )
        if not fits:
            self.stand_in = _stand_in(model)
        theirs = own_state(model)
        keys = {name: key for key, name in self._names.items()}
        for name, parameter in self.stand_in.named_parameters():
            data = self._tensor(keys[name]) if name in keys else theirs[name]
            replace_parameter_data_(parameter, data.detach().clone())
        for name, buffer in list(self.stand_in.named_buffers()):
            module, _, last = name.rpartition(".")
            data = self._tensor(keys[name]) if name in keys else theirs.get(name, buffer)
            setattr(self.stand_in.get_submodule(module), last, data.detach().clone())

    def give_back(self) -> None:
        """Put what the stand-in holds into the container's tensors, which stay the same objects."""
        held = self.stand_in.state_dict(keep_vars=True)
        given: set[int] = set()
        for key, name in self._names.items():
            tensor, data = self._tensor(key), held[name].detach()
            if not (data.is_floating_point() or data.shape != tensor.shape or name.endswith(_SLOTS)):
                continue
            data = data.to(tensor.device, tensor.dtype)
            data = data.clone() if id(held[name]) in given else data
            given.add(id(held[name]))
            if tensor.is_inference():
                self._tensors[key] = data  # type: ignore[index]
            else:
                tensor.data = data
        self._describe(held)

    def _describe(self, held: Any) -> None:
        """A state dict says what structure it has in its metadata."""
        described = getattr(self._tensors, "_metadata", None)
        texts = [(key, name) for key, name in self._names.items() if isinstance(key, str)]
        if described is not None and texts:
            prefix = texts[0][0][: -len(texts[0][1])] if texts[0][0] != texts[0][1] else ""
            described.update({(prefix + path).rstrip("."): dict(d) for path, d in held._metadata.items()})

    def layer(self, name: str) -> BlockSparseLayer:
        """A block-sparse layer of the stand-in."""
        layer: Any = self.stand_in.get_submodule(name)
        return layer

    def swap_back(self, model: nn.Module, layers: Mapping[str, BlockSparseLayer]) -> None:
        """Give dense weights to the container, under the names that they have in a dense model."""
        self.take_in(model, layers)
        self.stand_in = swap_back(self.stand_in)
        self._give_dense(layers)

    def turn_dense(
        self, model: nn.Module, layers: Mapping[str, BlockSparseLayer], names: Sequence[str]
    ) -> None:
        """:meth:`swap_back` of the layers ``names`` only."""
        self.take_in(model, layers)
        for name in names:
            self.layer(name).to_dense()
        self._give_dense({name: layers[name] for name in names})

    def _give_dense(self, layers: Mapping[str, BlockSparseLayer]) -> None:
        slots = {f"{name}.{_SLOTS}" for name in layers}
        for key in [k for k, name in self._names.items() if name in slots]:
            del self._names[key]
            if isinstance(self._tensors, MutableMapping):
                del self._tensors[key]
        ours = {f"{name}.{_VALUES}": f"{name}.{_WEIGHT}" for name in layers}
        self._names = {key: ours.get(name, name) for key, name in self._names.items()}
        if isinstance(self._tensors, MutableMapping):
            self._rename(_WEIGHT, layers, was=_VALUES)
        self.give_back()

    def _rename(self, new: str, layers: Mapping[str, BlockSparseLayer], *, was: str) -> None:
        """Rename the keys of the layers' weights; the order of the keys stays."""
        renamed: dict[Any, Any] = {}
        for key in self._tensors:
            layer, _, last = self._names.get(key, "").rpartition(".")
            named = isinstance(key, str) and layer in layers and last == new and key.endswith(f".{was}")
            renamed[key] = key[: -len(was)] + new if named else key
        if any(key is not other for key, other in renamed.items()):
            tensors: Any = self._tensors
            items = [(renamed[key], value) for key, value in tensors.items()]
            tensors.clear()
            tensors.update(items)
            self._names = {renamed[key]: name for key, name in self._names.items()}


def _stand_in(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, BlockSparseLayer) and isinstance(module.copy_watch, CopyWatch):
            module.copy_watch.follows = True
    return twin


def _names(
    tensors: MutableMapping[Any, Any] | Sequence[Any],
    model: nn.Module,
    layers: Mapping[str, BlockSparseLayer],
) -> dict[Any, str]:
    """Which entry of the model's state dict each tensor mirrors; a dense ``weight`` counts for ``values``."""
    if isinstance(tensors, MutableMapping):
        return _names_by_key(tensors, model, layers)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected the copy as an nn.Module or tensors, got {type(tensor).__name__} in it"
            )
    known = own_state(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    everything = [name for name, _ in model.named_parameters()]
    orders = [
        everything,
        trained,
        [*everything, *(name for name, _ in model.named_buffers())],
        list(known),
    ]
    for order in orders:
        if len(order) == len(tensors):
            pairs = list(zip(order, tensors, strict=True))
            if all(_dense_name(n, t, known, layers) is not None for n, t in pairs):
                return {i: str(_dense_name(n, t, known, layers)) for i, (n, t) in enumerate(pairs)}
    raise ValueError(
        f"expected a list with a copy of each parameter ({len(everything)}), of each that is trained "
        f"({len(trained)}) or of each value of the state dict ({len(known)}), in their order and shapes, got "
        f"{len(tensors)} tensors: let a copy follow right after making it"
    )


def _dense_name(
    name: str, tensor: Tensor, known: Mapping[str, Tensor], layers: Mapping[str, BlockSparseLayer]
) -> str | None:
    """The name that ``tensor`` goes by, None where it does not fit."""
    if tensor.shape == known[name].shape:
        return name
    layer, _, last = name.rpartition(".")
    if layer in layers and last == _VALUES and tensor.shape == layers[layer].weight.shape:
        return f"{layer}.{_WEIGHT}"
    return None


def _names_by_key(
    tensors: MutableMapping[Any, Any], model: nn.Module, layers: Mapping[str, BlockSparseLayer]
) -> dict[Any, str]:
    known = {*own_state(model), *(name for name, _ in model.named_parameters())}
    known |= {f"{name}.{_WEIGHT}" for name in layers}
    by_parameter = {parameter: name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for prefix in _PREFIXES:
        found: dict[Any, str] = {}
        for key, tensor in tensors.items():
            if isinstance(key, nn.Parameter) and key in by_parameter and isinstance(tensor, Tensor):
                name = _dense_name(by_parameter[key], tensor, {by_parameter[key]: key}, layers)
                found[key] = name or by_parameter[key]
            elif isinstance(key, str) and key.startswith(prefix) and key.removeprefix(prefix) in known:
                found[key] = key.removeprefix(prefix)
        dense = {f"{name}.{_WEIGHT}": f"{name}.{_VALUES}" for name in layers}
        found = {k: n for k, n in found.items() if dense.get(n) not in found.values()}
        held = set(found.values())
        # Where no layer is block-sparse, every weight that is trained may get another shape.
        whole = bool(layers) or trained <= held
        if whole and all(held & {f"{name}.{_VALUES}", f"{name}.{_WEIGHT}"} for name in layers):
            return found
    wanted = [f"{name}.{_VALUES}" for name in layers] or sorted(trained)
    missing = next((name for name in wanted if name not in tensors), wanted[0])
    raise ValueError(
        f"expected a dict with a tensor for each weight, by its name or Parameter, got none for "
        f"{missing} among {[str(key) for key in list(tensors)[:5]]}"
    )
