"""Whether model, optimizers and a loaded pruner's state still fit each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.optimizer_state import check_state_shapes
from dynaprune.pruning.edit.structure import Structure


class Consistency:
    """Checks a structure when its shapes have changed since the last check, or when something was loaded."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._shapes: list[torch.Size] = []
        self._slots: Mapping[str, Tensor] | None = None

    def loaded(self, slots: Mapping[str, Tensor] | None = None) -> None:
        """A state was loaded: check before the next step.

        Args:
            slots: of every layer, as a pruner's state says; the model's have to be the same by then.
        """
        self._shapes = []
        self._slots = slots if slots is not None else self._slots

    def check_if_changed(self) -> None:
        """:meth:`check` where a layer has another shape or another kind than at the last check."""
        layers = self._structure.modules.values()
        kinds = all(isinstance(layer, BlockSparseLayer) for layer in layers)
        if not kinds or [layer.values.shape for layer in layers] != self._shapes:
            self.check()

    def check(self) -> None:
        """Raise RuntimeError where the optimizers' state, or a loaded one, does not fit the structure."""
        structure = self._structure
        for name, layer in structure.modules.items():
            if structure.model.get_submodule(name) is not layer or not isinstance(layer, BlockSparseLayer):
                raise RuntimeError(
                    f"layer {name} is no longer the one that this pruner was attached to: a state of another "
                    "kind was loaded, or the layer was replaced; attach again"
                )
        named = [(f"{name}.values", layer.values) for name, layer in structure.modules.items()]
        check_state_shapes(structure.optimizers, named)
        for name, slots in (self._slots or {}).items():
            mine = structure.layers[name].layer.layout.slot_of_block
            if slots.shape != mine.shape or not torch.equal(slots.to(mine.device), mine):
                raise RuntimeError(
                    f"the pruner's state was saved with another structure of {name} than the model has "
                    "now: load the model's, the optimizer's and the pruner's state of the same moment"
                )
        self._slots = None
        self._shapes = [values.shape for _, values in named]
