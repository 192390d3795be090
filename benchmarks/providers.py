"""Who solves a benchmark's problem: ours by backend, the vendor's dense ops, other block-sparse libraries.

A provider is a name and a function that prepares a call; what cannot run raises :class:`Unavailable` with the
reason.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases import Call, Case, Operands, call, dense_call, dense_result, problem_of
from dynaprune_kernels import reference
from dynaprune_kernels.backends import cpu, cuda, dispatch, triton

Provider = Callable[[Case, Operands], Call]
OURS: dict[str, ModuleType] = {
    "dynaprune-triton": triton,
    "dynaprune-cuda": cuda,
    "dynaprune-cpu": cpu,
    "dynaprune-dense": reference,
}


class Unavailable(Exception):
    """Why a provider cannot solve a case."""


def _ours(name: str) -> Provider:
    def prepare(case: Case, operands: Operands) -> Call:
        backend = name.removeprefix("dynaprune-")
        device = operands.x.device
        _, capability = dispatch.device_facts(device)
        reason = dispatch.why_not(backend, problem_of(case, operands), device.type, capability)
        if reason is not None:
            raise Unavailable(reason)
        return call(case, operands, OURS[name])

    return prepare


def dense(case: Case, operands: Operands) -> Call:
    """The dense op of the vendor's library: cuBLAS, cuDNN, MKL or oneDNN behind torch."""
    return dense_call(case, operands)


def dense_as_convolution(case: Case, operands: Operands) -> Call:
    """A linear layer as a 1x1 convolution: oneDNN's, often faster than the matrix product of MKL."""
    if case.conv is not None or operands.x.is_cuda:
        raise Unavailable("for linear layers on the CPU")

    def image(t: Tensor) -> Tensor:
        return t.t().reshape(1, t.shape[1], t.shape[0], 1).contiguous(memory_format=torch.channels_last)

    x, dy = image(operands.x), image(operands.dy)
    weight = operands.dense.view(case.out, case.inputs, 1, 1).contiguous(memory_format=torch.channels_last)
    if case.op.endswith("forward"):
        return lambda: F.conv2d(x, weight)
    wgrad = not case.op.endswith("dgrad")

    def backward() -> Tensor:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [not wgrad, wgrad, False]
        )
        return dw if wgrad else dx

    return backward


def _torch_bsr(stages: int) -> Provider:
    def prepare(case: Case, operands: Operands) -> Call:
        if case.op != "linear_forward":
            raise Unavailable("torch.sparse has no block-sparse kernel for this op")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bsr = operands.dense.to_sparse_bsr((case.block, case.block))
        if not operands.x.is_cuda:
            if stages != 1:
                raise Unavailable("stages are a setting of the GPU's kernel")
            return lambda: F.linear(operands.x, bsr)
        from torch.sparse._triton_ops import bsr_dense_addmm, bsr_dense_addmm_meta

        x = operands.x.t()
        out = torch.empty(case.out, case.batch, dtype=case.dtype, device=x.device)
        meta = bsr_dense_addmm_meta(
            case.out, case.inputs, case.batch, case.block, case.block, 0, 1,
            num_stages=stages, num_warps=4, GROUP_SIZE_ROW=4,
        )  # fmt: skip
        return lambda: bsr_dense_addmm(out, bsr, x, beta=0, alpha=1, out=out, meta=meta).t()

    return prepare


def stk(case: Case, operands: Operands) -> Call:
    """The kernels of MegaBlocks (PyPI ``stanford-stk``): blocks of 128, 16-bit types, linear layers."""
    if importlib.util.find_spec("stk") is None:
        raise Unavailable("stanford-stk is not installed")
    if case.conv is not None or case.block != 128 or case.dtype.itemsize != 2 or not operands.x.is_cuda:
        raise Unavailable("takes linear layers in blocks of 128 and 16-bit types on a GPU")
    import stk as library

    weight = library.ops.to_sparse(operands.dense, case.block)
    x, dy = operands.x, operands.dy
    if case.op.endswith("forward"):
        return lambda: library.ops.dds(x, weight.t())
    if case.op.endswith("dgrad"):
        return lambda: library.ops.dds(dy, weight)
    if case.op.endswith("wgrad"):
        return lambda: library.ops.sdd(dy.t(), x, weight).data
    raise Unavailable("has no such op")


PROVIDERS: dict[str, Provider] = {
    "dense": dense,
    "dense-conv1x1": dense_as_convolution,
    **{name: _ours(name) for name in OURS},
    "torch-bsr-1-stage": _torch_bsr(1),
    "torch-bsr-4-stages": _torch_bsr(4),
    "stk": stk,
}


def comparable(provider: str, case: Case, operands: Operands, result: Tensor) -> Tensor:
    """A provider's result in the form of ours."""
    if provider == "dense-conv1x1":
        if case.op.endswith(("forward", "dgrad")):
            return result[0, :, :, 0].t()
        return dense_result(case, operands, result[:, :, 0, 0])
    if provider == "dense":
        return dense_result(case, operands, result)
    if provider == "stk" and case.op.endswith("wgrad"):  # blocks in row order, outputs first
        slots = operands.layout.lists.row_slots.long()
        by_slot = torch.empty_like(result)
        by_slot[slots] = result
        return by_slot.transpose(1, 2)
    return result
