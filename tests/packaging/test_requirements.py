"""The oldest versions that are tested are the lower bounds that pyproject.toml states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
# torch is named in the Makefile; triton's tests are tied to one version; the sweep has its own environment.
ELSEWHERE = {"torch", "triton", "timm", "torchvision", "dynaprune"}


def stated() -> dict[str, Version]:
    """The lower bound of each dependency, extras included, development tools not."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    found: dict[str, Version] = {}
    for requirement in map(Requirement, lines):
        if requirement.name in ELSEWHERE:
            continue
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        assert found.setdefault(requirement.name, Version(bound.version)) == Version(bound.version), (
            requirement
        )
    return found


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    lines = [
        line for line in (ROOT / "requirements" / "oldest.txt").read_text().splitlines() if line[0] != "#"
    ]
    pinned = {name: Version(version) for name, version in (line.split("==") for line in lines)}
    assert pinned == stated()
    assert len(lines) == len(pinned) > 20


def test_the_oldest_torch_is_the_lower_bound() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = [Requirement(line) for line in project["dependencies"] if line.startswith("torch")]
    pinned = re.search(r"^OLDEST_TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None and Version(pinned[1]) == Version(str(torch.specifier).removeprefix(">="))
