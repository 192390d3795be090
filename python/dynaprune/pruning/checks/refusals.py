"""What ``attach`` refuses, by name and with the reason: models and optimizers that it would train wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from dynaprune.nn import BlockSparseLayer
from dynaprune.pruning.checks.one_process import in_a_group, inside, wrapper_reason
from dynaprune.pruning.config import PruningConfig

# Packages whose optimizer wrappers keep no state per weight: stepping the wrapper steps what is inside.
_TRANSPARENT_WRAPPERS = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric")
_NEED_MATRICES = ("Muon", "Shampoo", "SOAP", "KFAC")


def unwrap_model(model: Any, *, meta: bool = False) -> nn.Module:
    """The module behind ``torch.compile`` and, in one process, DistributedDataParallel; refuses wrappers that
    own the parameters.

    Args:
        meta: allow parameters on the meta device.

    Raises:
        TypeError: not a module. ValueError: a wrapper, a lazy model or a process group that cannot be pruned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model as an nn.Module, got {type(model).__name__}")
    _refuse_distributed()
    for module in model.modules():
        if reason := _wrapper_reason(module):
            raise ValueError(f"cannot attach to {type(module).__name__}: {reason}")
    on_meta = [name for name, p in model.named_parameters() if p.is_meta and not meta]
    if on_meta:
        raise ValueError(
            f"cannot attach to a model on the meta device ({on_meta[0]}): give it weights first, or let "
            "dynaprune.prepare begin it sparse (initial_sparsity)"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"cannot attach to a model with lazy parameters ({lazy[0]}): run one forward pass first"
        )
    inner = inside(model)
    if isinstance(inner, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        raise ValueError(
            f"expected a model that contains its layers, got a bare {type(inner).__name__}: "
            "wrap it in nn.Sequential, so that the layer can be replaced"
        )
    return inner


def _refuse_distributed() -> None:
    if in_a_group() and (size := torch.distributed.get_world_size()) > 1:
        raise ValueError(
            f"cannot attach at world size {size}: ranks would prune differently, and "
            "compaction would silently lose DistributedDataParallel's averaging; train in one process"
        )


def _wrapper_reason(module: nn.Module) -> str | None:
    names = {base.__name__ for base in type(module).__mro__}
    if type(module).__module__.split(".")[0] == "deepspeed":
        return "DeepSpeed keeps weights and optimizer state in flat partitions that blocks cannot be cut from"
    if names & {"FullyShardedDataParallel", "FSDPModule"}:
        return "FSDP keeps weights in flat shards that blocks cannot be cut from"
    if isinstance(module, DistributedDataParallel):
        return wrapper_reason(module) or None
    if "DistributedDataParallel" in names:
        return "it is not torch's; in one process the model needs no such wrapper: attach without it"
    if "DataParallel" in names:
        return "its replicas would be cut from masks of another device; train on one device"
    return None


def unwrap_optimizers(optimizer: Any, *, blocks: bool = True) -> list[torch.optim.Optimizer]:
    """The torch optimizers behind ``optimizer``: one, a list, or wrapped by accelerate or Lightning.

    Args:
        blocks: whether they are to train blocks; otherwise weights keep their dimensions.

    Raises:
        TypeError: something else. ValueError: an optimizer that cannot train blocks, with the reason.
    """
    given = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    if not given:
        raise ValueError("expected at least one optimizer, got an empty list")
    found = [_unwrap(each) for each in given]
    for index, each in enumerate(found):
        if any(each is other for other in found[:index]):
            raise ValueError(f"expected each optimizer once, got the same {type(each).__name__} twice")
        if reason := _optimizer_reason(each, blocks):
            raise ValueError(f"cannot attach to {type(each).__name__}: {reason}")
    return found


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    seen = optimizer
    for _ in range(8):
        if type(seen).__module__.split(".")[0] == "deepspeed" or "DeepSpeed" in type(seen).__name__:
            raise ValueError(
                f"cannot attach to {type(seen).__name__}: DeepSpeed keeps weights and optimizer state in "
                "flat partitions that blocks cannot be cut from"
            )
        inner = getattr(seen, "optimizer", None)
        known = type(seen).__module__.split(".")[0] in _TRANSPARENT_WRAPPERS
        if not (known and isinstance(inner, torch.optim.Optimizer)):
            break
        seen = inner
    if not isinstance(seen, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer or a list of them, got {type(seen).__name__}")
    return seen


def _optimizer_reason(optimizer: torch.optim.Optimizer, blocks: bool) -> str | None:
    names = [base.__name__ for base in type(optimizer).__mro__]
    if "LBFGS" in names:
        return "LBFGS keeps a history of flattened parameters that blocks cannot be cut from"
    for name in names:
        if blocks and any(known.lower() in name.lower() for known in _NEED_MATRICES):
            return f"{name} needs 2-D weights, and a block-sparse layer trains a list of blocks"
    if isinstance(getattr(optimizer, "base_optimizer", None), torch.optim.Optimizer):
        return "it steps another optimizer: attach to that one, its base_optimizer"
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return "it has no step hooks (its __init__ does not call torch.optim.Optimizer's)"
    return None


def refuse_in_backward(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise ValueError where a parameter is stepped inside backward, by the names of layers given."""
    for name, parameter in parameters:
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
        if getattr(parameter, "_in_backward_optimizers", None) or hooks:
            raise ValueError(
                f"cannot attach: the weight of {name} has a hook that runs when its gradient is ready (an "
                "optimizer in backward); pruning changes shapes after the step, which must not happen inside "
                "backward"
            )


def refuse_without_prunable_weights(
    candidates: Sequence[tuple[str, nn.Parameter]], optimizers: Sequence[torch.optim.Optimizer]
) -> set[int]:
    """Ids of all parameters of the optimizers; ValueError where none of the candidates is among them."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if candidates and not any(id(p) in held for _, p in candidates):
        names = ", ".join(name for name, _ in candidates[:4])
        kinds = ", ".join(type(each).__name__ for each in optimizers)
        raise ValueError(
            f"expected an optimizer that holds prunable weights of the model ({names}, ...), got {kinds} "
            "with none of them"
        )
    return held


def refuse_without_room(layers: Mapping[str, BlockSparseLayer], config: PruningConfig) -> None:
    """Raise ValueError where blocks are to change places and every place is taken. Syncs."""
    if not config.rewire or config.policy is not None:
        return
    if all(layer.layout.live_count() == layer.layout.blocks for layer in layers.values()):
        raise ValueError(
            f"expected blocks that are missing beside rewire={config.rewire}, got layers that begin whole: "
            "begin sparse (initial_sparsity), or let part of what is removed return (regrow)"
        )
