"""Finds and loads the compiled extensions, with raw kernels: `_C.abi3.so` those of `torch.ops.dynaprune_cpu`,
`_C_cuda.abi3.so` those of `torch.ops.dynaprune_cuda`, which nothing loads before a CUDA tensor needs it.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_REBUILD = (
    "run `pip install --no-build-isolation -e .` (in a checkout: `make ext`), "
    "then `python -m dynaprune_kernels.info`"
)


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of a compiled extension.

    Attributes:
        path: the file, or None where there is none or it was not looked for.
        reason: why the extension is not loaded, with what to run; None where it is loaded.
    """

    path: Path | None
    reason: str | None

    @property
    def loaded(self) -> bool:
        """Whether its raw ops are there."""
        return self.reason is None


def find(name: str = "_C") -> Path | None:
    """The file of the extension `name` beside this one, or None."""
    files = sorted(_PACKAGE.glob(f"{name}.*so"))
    return next((file for file in files if file.name == f"{name}.abi3.so"), files[0] if files else None)


def build_facts() -> dict[str, Any]:
    """What setup.py recorded about the build: `extension`, and `reason` or `torch`, `compiler` and `flags`.

    With an extension, `cuda` has the same about the CUDA part: `extension`, and `reason` or `compiler`,
    `flags` and `architectures`. Empty where the package was never installed, or the record cannot be read.
    """
    try:
        facts = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@functools.cache
def load() -> ExtensionStatus:
    """Loads the CPU kernels once per process; never raises, the status says what happened.

    The environment variable DYNAPRUNE_DISABLE_EXT=1 leaves them unloaded.
    """
    why = build_facts().get("reason") or f"no _C.abi3.so in {_PACKAGE}"
    return _load(
        "_C", f"the compiled extension was not built: {why}; {_REBUILD}", "dynaprune_cpu", "capability"
    )


@functools.cache
def load_cuda() -> ExtensionStatus:
    """Loads the CUDA kernels once per process, as :func:`load` does the CPU's; needs no GPU and no driver."""
    facts = build_facts()
    why = facts.get("cuda", {}).get("reason") or facts.get("reason") or f"no _C_cuda.abi3.so in {_PACKAGE}"
    return _load(
        "_C_cuda", f"the CUDA kernels were not built: {why}; {_REBUILD}", "dynaprune_cuda", "architectures"
    )


def _load(name: str, missing: str, library: str, op: str) -> ExtensionStatus:
    """Loads the extension `name`, which registers `op` in `library`; `missing` says why there is no file."""
    if os.environ.get("DYNAPRUNE_DISABLE_EXT", "0") not in ("", "0"):
        return ExtensionStatus(None, "DYNAPRUNE_DISABLE_EXT is set; unset it to use the compiled kernels")
    path = find(name)
    if path is None:
        return ExtensionStatus(None, missing)
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        built_with = build_facts().get("torch")
        made = f" (built with torch {built_with}, running torch {torch.__version__})" if built_with else ""
        return ExtensionStatus(
            path, f"{path} could not be loaded{made}: {error}; to build it again {_REBUILD}"
        )
    if not hasattr(getattr(torch.ops, library), op):
        return ExtensionStatus(path, f"{path} registers no {library} kernels; to build it again {_REBUILD}")
    return ExtensionStatus(path, None)
