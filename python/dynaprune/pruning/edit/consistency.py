"""Whether model, optimizers and a loaded pruner's state still fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        self._widths: Mapping[str, Sequence[int]] | None = None

    def loaded(
        self,
        slots: Mapping[str, Tensor] | None = None,
        widths: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """A state was loaded: check before the next step.

        Args:
            slots: of every layer, as a pruner's state says; the model's have to be the same by then.
            widths: likewise outputs and inputs of plain layers that get narrower.
        """
        self._shapes = []
        self._slots = slots if slots is not None else self._slots
        self._widths = widths if widths is not None else self._widths

    def check_if_changed(self) -> None:
        """:meth:`check` where a layer has another shape or another kind than at the last check."""
        kinds = all(isinstance(layer, BlockSparseLayer) for layer in self._structure.modules.values())
        if not kinds or [weight.shape for _, weight in self._structure.trained] != self._shapes:
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
        for name, plain in structure.neurons.makers.items():
            if structure.model.get_submodule(name) is not plain or isinstance(plain, BlockSparseLayer):
                raise RuntimeError(
                    f"layer {name} is no longer the plain one that this pruner was attached to: attach again"
                )
        named = structure.trained
        check_state_shapes(structure.optimizers, named)
        for name, slots in (self._slots or {}).items():
            mine = structure.layers[name].layer.layout.slot_of_block
            if slots.shape != mine.shape or not torch.equal(slots.to(mine.device), mine):
                raise RuntimeError(
                    f"the pruner's state was saved with another structure of {name} than the model has "
                    "now: load the model's, the optimizer's and the pruner's state of the same moment"
                )
        self._check_widths()
        self._slots = self._widths = None
        self._shapes = [values.shape for _, values in named]

    def _check_widths(self) -> None:
        now = self._structure.neurons.widths()
        for name, saved in (self._widths or {}).items():
            if list(saved) != list(now.get(name, ())):
                raise RuntimeError(
                    f"the pruner's state was saved when {name} had {list(saved)} outputs and inputs, and it "
                    f"has {list(now.get(name, ()))} now: load the model's, the optimizer's and the pruner's "
                    "state of the same moment"
                )
