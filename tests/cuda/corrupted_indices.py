"""Corrupted indices for emulated kernels, by :mod:`tests.fuzz.corruptions`.

That module wants torch, which sanitized runs do not have: ``python -m tests.cuda.corrupted_indices`` makes
the indices in a process of its own, once for all processes.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.cuda.emulation import ROOT

Array = np.ndarray[Any, Any]

SOURCES = [Path(__file__), ROOT / "tests/fuzz/corruptions.py", ROOT / "tests/fuzz/kernel_problems.py"]
REFUSED = ("other_length", "other_tensor")  # by the bindings, before any kernel runs


class Layout(NamedTuple):
    """What corruptions start from; ``conv``: the numbers of ``ConvGeometry``, none for a linear layer."""

    mask: Array
    slots: Array
    capacity: int
    index: Array
    count: int  # of corruptions
    conv: tuple[int, ...] = ()


def corrupted_indices(layouts: dict[str, Layout]) -> dict[str, tuple[list[str], Array]]:
    """For each layout the kinds of its corruptions, and the indices, int32 ``[count, size]``."""
    named = {
        f"{name}/{field}": np.asarray(value)
        for name, layout in layouts.items()
        for field, value in layout._asdict().items()
    }
    digest = hashlib.sha256(sys.version.encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    for name, array in named.items():
        digest.update(name.encode() + np.ascontiguousarray(array, np.int64).tobytes())
    folder = Path(tempfile.gettempdir()) / f"dynaprune-emulation-{os.getuid()}"
    made = folder / f"indices-{digest.hexdigest()[:16]}.npz"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{made.stem}-{os.getpid()}.npz"
        np.savez(unfinished, **named)
        command = [sys.executable, "-m", "tests.cuda.corrupted_indices", str(unfinished)]
        variables = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        unfinished.replace(made)
    with np.load(made) as file:
        return {name: (file[f"{name}/kinds"].tolist(), file[f"{name}/indices"]) for name in layouts}


def main(path: str) -> None:
    """Replace the layouts in the file ``path`` by corruptions."""
    import torch

    from dynaprune_kernels.geometry import ConvGeometry
    from tests.fuzz.corruptions import CORRUPTIONS, corrupted
    from tests.fuzz.kernel_problems import Problem

    kinds = [kind for kind in CORRUPTIONS if kind not in REFUSED]
    made: dict[str, Array] = {}
    with np.load(path) as file:
        for name in sorted({key.partition("/")[0] for key in file}):
            layout = Layout(*(file[f"{name}/{field}"] for field in Layout._fields))
            numbers = np.asarray(layout.conv).astype(int).tolist()
            problem = Problem(
                ConvGeometry(*numbers) if numbers else None, 0, 0, (0, 0), layout.mask, layout.slots,
                int(layout.capacity), torch.from_numpy(layout.index), *[torch.empty(0)] * 5,
            )  # fmt: skip
            of = [kinds[number % len(kinds)] for number in range(int(layout.count))]
            indices = [
                corrupted(problem, kind, random.Random(f"{name}/{number}")) for number, kind in enumerate(of)
            ]
            made |= {f"{name}/kinds": np.array(of), f"{name}/indices": torch.stack(indices).numpy()}
    np.savez(path, **made)


if __name__ == "__main__":
    main(sys.argv[1])
