"""A sparse start from the meta device: the dense model is never there, at most one layer of it at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaprune.families.family import note_families
from dynaprune.neurons.example_inputs import ExampleInputs
from dynaprune.nn import BlockSparseLayer
from dynaprune.nn.materialise import children_first, initialise_, materialise_, on_meta
from dynaprune.nn.swap import SPARSE_TYPES, choose_layers, swap_layer
from dynaprune.pruning.checks.pretrained import refuse_trained
from dynaprune.pruning.checks.reachable import refuse_unknown_floors
from dynaprune.pruning.config import PruningConfig
from dynaprune.pruning.decide.initial_masks import Grid
from dynaprune.pruning.prepared import Prepared
from dynaprune.pruning.sparse_start import begun_sparse, planned_masks


def prepare_from_meta(
    given: nn.Module,
    model: nn.Module,
    config: PruningConfig,
    example: ExampleInputs | None,
    device: torch.device,
) -> Prepared:
    """Materialise ``model`` on ``device``, module by module; of layers that begin sparse their blocks only.

    What is real already stays as it is and where it is.

    Raises:
        ValueError: layers that are block-sparse already, a tensor that no initialiser sets, an initial
            sparsity that these layers cannot have. From the first materialised module on the model is not as
            it was: build it anew.
    """
    _refuse_what_nothing_sets(model)
    note_families(model, config.families)
    entries = choose_layers(
        model, config.block_size, types=config.layer_types, include=config.include, exclude=config.exclude
    )
    chosen = [entry.name for entry in entries if entry.swapped]
    refuse_unknown_floors(config, tuple(chosen))
    if not config.mask_pretrained and not all(_weight(model, name).is_meta for name in chosen):
        refuse_trained(model)
    masks = planned_masks({name: _grid(model, name, config) for name in chosen}, config)
    layers: dict[str, BlockSparseLayer] = {}
    new = {path for path, module in model.named_modules() if _wholly_on_meta(module)}
    for path, module in children_first(model):
        if on_meta(module):
            materialise_(model, path, device)
        elif path in new:
            initialise_(model, path)
        if path in masks:
            layers[path] = swap_layer(model, path, config.block_size, masks.pop(path))
    exempt = {entry.name: entry.reason for entry in entries if not entry.swapped}
    prepared = Prepared(given, model, config, exempt, tuple(chosen), example, False)
    return begun_sparse(prepared, {name: layers[name] for name in chosen})


def real_device(model: nn.Module) -> torch.device:
    """Where the model's real tensors are; torch's default device where it has none."""
    tensors = (t for group in (model.parameters(), model.buffers()) for t in group)
    return next((t.device for t in tensors if not t.is_meta), torch.get_default_device())


def _refuse_what_nothing_sets(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, BlockSparseLayer):
            raise ValueError(f"expected plain layers in a model on the meta device, got {path} block-sparse")
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"cannot materialise {f'{path}.{name}'.lstrip('.')}: it is a tensor on the meta device, "
                    "and neither a parameter nor a buffer"
                )


def _wholly_on_meta(module: nn.Module) -> bool:
    """Whether it holds Parameters, all of them on the meta device: then it may give them values."""
    parameters = list(module.parameters())
    return bool(parameters) and all(each.is_meta for each in parameters)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name)._parameters["weight"]
    assert weight is not None
    return weight


def _grid(model: nn.Module, name: str, config: PruningConfig) -> Grid:
    layer = model.get_submodule(name)
    layout = SPARSE_TYPES[type(layer)].layout_for(layer, config.block_size, None, torch.device("cpu"))
    return Grid.of(layout)
