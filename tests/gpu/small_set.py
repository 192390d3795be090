"""A few small calls of every kernel, for compute-sanitizer: ``python -m tests.gpu.small_set triton``.

``--dtype bfloat16`` takes the cases of one type.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import torch

from dynaprune_kernels import ConvGeometry
from dynaprune_kernels.backends import dispatch
from dynaprune_kernels.backends.problem import Problem
from tests.triton.parity import Case, check_gradients, check_layout, check_products, check_saliency

CASES = [
    Case(70, 90, (32, 64), "random", 37),
    Case(64, 128, (64, 64), "cross", 200, torch.bfloat16),
    Case(48, 80, (16, 16), "random", 20, torch.float16),
    Case(48, 40, (16, 16), "random", 2, torch.bfloat16, ConvGeometry(3, 3, 2, 2, 1, 1), (7, 9)),
    Case(64, 64, (32, 32), "random", 1, conv=ConvGeometry(3, 3, 1, 1, 1, 1, groups=2), size=(6, 5)),
    Case(64, 72, (64, 64), "random", 2, torch.bfloat16, ConvGeometry(3, 3, 2, 2, 1, 1), (7, 9)),
]


def against(backend: str) -> str | None:
    """Why the backend cannot run on the current GPU; None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    _, capability = dispatch.device_facts(torch.device("cuda", torch.cuda.current_device()))
    problem = Problem("linear_forward", torch.float32, (64, 64))
    return dispatch.why_not(backend, problem, "cuda", capability)


def check(case: Case, kernels: ModuleType) -> None:
    """Every kernel on one case."""
    torch.manual_seed(0)
    check_products(case, "cuda", kernels=kernels)
    check_gradients(case, "cuda", kernels=kernels)
    check_saliency(case, "cuda", kernels)
    check_layout(case, "cuda", kernels)


def main(arguments: list[str] | None = None) -> int:
    """Run and check every case on the backend ``triton`` or ``cuda``; 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=["triton", "cuda"])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="all by default")
    options = parser.parse_args(arguments)
    backend = options.backend
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reason = against(backend)
    if reason is not None:
        print(f"not run: {reason}")
        return 2
    for case in CASES:
        if options.dtype is not None and case.dtype != getattr(torch, options.dtype):
            continue
        check(case, dispatch.BACKENDS[backend])
        print(case, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
