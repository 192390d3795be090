"""Three calls to a rented GPU: ``python -m tests.gpu parity``, then ``speed``, then ``sanitizers``.

Each ends by itself (within 6, 9 and 8 minutes), whatever hangs or fails in it, and leaves one file to bring
home: ``OUT/GPU/CALL/CALL.tar.gz``. The exit status is 1 where a part failed that counts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tests.gpu.calls import CALLS
from tests.gpu.parts import Outcome, pack, run_call

WATCHDOG = Path("build/watchdog/dynaprune_kernels/_C_cuda.abi3.so")


def device_name() -> str | None:
    """The GPU's name for a folder; None where torch sees none."""
    import torch

    from dynaprune_kernels.backends.triton.config import file_of

    return file_of(torch.cuda.get_device_name()).stem if torch.cuda.is_available() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--limit", type=float, help="seconds in all, in place of the call's own")
    parser.add_argument("--side-by-side", type=int, default=4, help="processes of single kernels at a time")
    options = parser.parse_args(arguments)
    name = device_name()
    if name is None:
        print(f"torch of {sys.executable} sees no NVIDIA GPU: nothing to do", file=sys.stderr)
        return 2
    limit, parts = CALLS[options.call]
    out = options.out / name / options.call
    shutil.rmtree(out, ignore_errors=True)
    watchdog = WATCHDOG if WATCHDOG.is_file() else None
    outcomes = run_call(parts(out, watchdog), out, options.limit or limit, side_by_side=options.side_by_side)
    print(f"wrote {pack(out, options.call)}")
    return 0 if conclude(outcomes) else 1


def conclude(outcomes: list[Outcome]) -> bool:
    """Print what did not pass; whether all passed that counts."""
    for outcome in outcomes:
        if outcome.said != "passed":
            print(
                f"{outcome.part.name}: {outcome.said}" + ("" if outcome.part.counts else " (does not count)")
            )
    print(f"{sum(o.said == 'passed' for o in outcomes)} of {len(outcomes)} parts passed")
    return all(outcome.good for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
