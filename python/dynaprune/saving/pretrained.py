"""``from_pretrained`` for pruned models: ``config.json`` carries the structure, and loading follows it.

transformers lets a package bring its own forms of layers as a "quantizer", found by the ``quant_method`` in
``config.json``. Importing this module registers ours, ``dynaprune``; nothing is quantized. Where it is not
imported, transformers warns of an unknown quantization type and stops at weights of a wrong size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynaprune.nn import BlockSparseLayer
from dynaprune.saving.carried import guarded_weights, slot_checksums
from dynaprune.saving.checksum import checksum_of, verify
from dynaprune.saving.manifest import layer_shape, read_manifest, structure_manifest
from dynaprune.saving.reshape import CARRIED_PREFIX, apply_structure, expected_shapes
from dynaprune_kernels import BlockLayout

METHOD = "dynaprune"


@register_quantization_config(METHOD)
class StructureConfig(QuantizationConfigMixin):
    """The entry in a model's config that says its structure: of a live model the one it has when asked.

    Args:
        structure: a manifest read from ``config.json``.
        checksums: of the structure, and of each block-sparse layer's slots; None in older files.

    Attributes:
        plain: of a live model's entry, the structure that the model's own code builds.
    """

    def __init__(
        self,
        structure: Mapping[str, Any] | None = None,
        checksums: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self._structure, self.checksums = structure, checksums
        self._model: ref[nn.Module] | None = None
        self.plain: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, model: nn.Module, plain: Mapping[str, Any]) -> StructureConfig:
        """The entry of a live model."""
        entry = cls()
        entry._model, entry.plain = ref(model), plain
        return entry

    def structure(self) -> Mapping[str, Any] | None:
        """The manifest; None where the model has the structure that its own code builds."""
        model = self._model() if self._model is not None else None
        if model is None:
            return self._structure
        manifest = structure_manifest(model)
        return None if manifest == self.plain else manifest

    def to_dict(self) -> Any:
        """What ``config.json`` gets; None (no entry) for a model as its own code builds it."""
        structure = self.structure()
        if structure is None:
            return None
        model = self._model() if self._model is not None else None
        slots = slot_checksums(model, model.state_dict()) if model is not None else {}
        checksums = self.checksums or {"structure": checksum_of([structure, slots]), "slots": slots}
        return {"quant_method": METHOD, "structure": structure, "checksums": checksums}

    def __deepcopy__(self, memo: dict[int, Any]) -> StructureConfig:
        model = self._model() if self._model is not None else None
        twin = memo.get(id(model)) if model is not None else None
        if twin is not None and self.plain is not None:
            return StructureConfig.of(twin, self.plain)
        return StructureConfig(self.structure(), self._checksums_now())

    def _checksums_now(self) -> Any:
        return (self.to_dict() or {}).get("checksums")

    def __reduce__(self) -> Any:
        return StructureConfig, (self.structure(), self._checksums_now())


def describe_structure(model: PreTrainedModel) -> Mapping[str, Any]:
    """Let the model's config say its structure from now on; the manifest that its own code builds.

    Raises:
        ValueError: a quantized model.
    """
    entry = getattr(model.config, "quantization_config", None)
    if entry is not None and not isinstance(entry, StructureConfig):
        raise ValueError(f"cannot prune a quantized model ({type(entry).__name__}): its weights are packed")
    config = copy.deepcopy(model.config)
    config.quantization_config = None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        plain = structure_manifest(type(model)(config))
    model.config.quantization_config = StructureConfig.of(model, plain)
    return plain


@register_quantizer(METHOD)
class StructureLoader(HfQuantizer):
    """Gives the skeleton in ``from_pretrained`` its structure before the weights are read."""

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the loaded model can be trained."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        entry: Any = self.quantization_config
        structure = entry.structure()
        self._plain = structure_manifest(model)
        self._slots = _verified(model, structure, entry.checksums)
        for name, shape in read_manifest(structure).items():
            module = model.get_submodule(name) if name in self._plain["layers"] else None
            if module is not None and layer_shape(module) != shape:
                module.to_empty(device="cpu")
        with torch.device("cpu"):
            apply_structure(model, structure)
        for layer in _sparse_layers(model):
            layer.__class__ = _while_loading(type(layer))
            slots = layer.layout.__dict__.pop("slot_of_block")
            layer.layout.register_buffer("slot_of_block", slots)  # the loader fills Parameters and buffers
        carried = [rf"^{re.escape(key)}$" for key in guarded_weights(model)]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *carried, rf"^{CARRIED_PREFIX}"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, layer in model.named_modules():
            if isinstance(layer, BlockSparseLayer):
                key = f"{name}.layout.slot_of_block"
                verify(layer.layout.slot_of_block, self._slots.get(key), key)
        for layer in _sparse_layers(model):
            layer.__class__ = type(layer).__base__
            _restore_layout(layer)
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        model.config.quantization_config = StructureConfig.of(model, self._plain)
        return model


def _verified(model: nn.Module, structure: Any, checksums: Any) -> Mapping[str, Any]:
    """The checksums of slots in a ``config.json`` whose structure is this model's, and as it was written."""
    expected_shapes(model, structure)
    if checksums is None:
        return {}
    if not isinstance(checksums, Mapping) or not isinstance(checksums.get("slots"), Mapping):
        raise ValueError(
            f"expected checksums of structure and slots in config.json, got {str(checksums)[:80]}"
        )
    verify([structure, checksums["slots"]], checksums.get("structure", ""), "the structure in config.json")
    return checksums["slots"]


def _sparse_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, BlockSparseLayer)]


def _while_loading(kind: type[nn.Module]) -> type[nn.Module]:
    """The layer while its indices are not there yet: transformers' initialisation of a module may look at a
    child's ``weight``, and skips a Parameter that was read from the checkpoint."""
    return type(kind.__name__, (kind,), {"weight": property(lambda layer: layer.values)})


def _restore_layout(layer: Any) -> None:
    """Make a layout, whose slots are no buffer, from the slots that were read."""
    old, values = layer.layout, layer.values
    rows_columns = old.slot_of_block.shape
    layer.layout = BlockLayout(
        old.out_features,
        old.in_features,
        old.block,
        conv=old.conv,
        mask=torch.zeros(rows_columns, dtype=torch.bool, device=values.device),
        capacity=values.shape[0],
        device=values.device,
    )
    layer.layout.restore_(old.slot_of_block.to(values.device), values.shape[0])
    layer.probe = torch.zeros((), dtype=torch.bool, device=values.device)
