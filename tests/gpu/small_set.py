"""A few small calls of every kernel, for compute-sanitizer: ``python -m tests.gpu.small_set``."""

from __future__ import annotations

import torch

from dynaprune_kernels import ConvGeometry
from tests.triton.parity import Case, check_gradients, check_layout, check_products, check_saliency

CASES = [
    Case(70, 90, (32, 64), "random", 37),
    Case(64, 128, (64, 64), "cross", 200, torch.bfloat16),
    Case(48, 80, (16, 16), "random", 20, torch.float16),
    Case(48, 40, (16, 16), "random", 2, torch.bfloat16, ConvGeometry(3, 3, 2, 2, 1, 1), (7, 9)),
    Case(64, 64, (32, 32), "random", 1, conv=ConvGeometry(3, 3, 1, 1, 1, 1, groups=2), size=(6, 5)),
]


def check(case: Case) -> None:
    """Every kernel on one case."""
    torch.manual_seed(0)
    check_products(case, "cuda")
    check_gradients(case, "cuda")
    check_saliency(case, "cuda")
    check_layout(case, "cuda")


def main() -> None:
    """Run and check every case."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for case in CASES:
        check(case)
        print(case, flush=True)


if __name__ == "__main__":
    main()
