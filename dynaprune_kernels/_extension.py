"""Finds and loads compiled extension `_C.abi3.so`, with the raw CPU kernels `torch.ops.dynaprune_cpu`."""

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
    """What became of the compiled extension.

    Attributes:
        path: the file, or None where there is none or it was not looked for.
        reason: why the extension is not loaded, with what to run; None where it is loaded.
    """

    path: Path | None
    reason: str | None

    @property
    def loaded(self) -> bool:
        """Whether `torch.ops.dynaprune_cpu` is there."""
        return self.reason is None


def find() -> Path | None:
    """The extension's file beside this one, or None."""
    files = sorted(_PACKAGE.glob("_C*.so"))
    return next((file for file in files if file.name == "_C.abi3.so"), files[0] if files else None)


def build_facts() -> dict[str, Any]:
    """What setup.py recorded about the build: `extension`, and `reason` or `torch`, `compiler` and `flags`.

    Empty where the package was never installed, or where the record cannot be read.
    """
    try:
        facts = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@functools.cache
def load() -> ExtensionStatus:
    """Loads the extension once per process; never raises, the status says what happened.

    The environment variable DYNAPRUNE_DISABLE_EXT=1 leaves it unloaded.
    """
    if os.environ.get("DYNAPRUNE_DISABLE_EXT", "0") not in ("", "0"):
        return ExtensionStatus(None, "DYNAPRUNE_DISABLE_EXT is set; unset it to use the compiled kernels")
    path = find()
    if path is None:
        why = build_facts().get("reason") or f"no _C.abi3.so in {_PACKAGE}"
        return ExtensionStatus(None, f"the compiled extension was not built: {why}; {_REBUILD}")
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        built_with = build_facts().get("torch")
        made = f" (built with torch {built_with}, running torch {torch.__version__})" if built_with else ""
        return ExtensionStatus(
            path, f"{path} could not be loaded{made}: {error}; to build it again {_REBUILD}"
        )
    if not hasattr(torch.ops.dynaprune_cpu, "capability"):
        return ExtensionStatus(
            path, f"{path} registers no dynaprune_cpu kernels; to build it again {_REBUILD}"
        )
    return ExtensionStatus(path, None)
