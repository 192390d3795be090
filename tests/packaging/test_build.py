"""What setup.py makes where the extension cannot be built or is not wanted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(_ROOT / name, folder)
    for name in ("csrc", "dynaprune_kernels", "python"):
        built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
        shutil.copytree(_ROOT / name, folder / name, ignore=built)
    return folder


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DYNAPRUNE_NO_EXT": "1"}, "DYNAPRUNE_NO_EXT was set"),
        ({"CXX": "no-such-compiler -O2"}, "looked for no-such-compiler"),
    ],
)
def test_pure_wheel_says_and_remembers_why(checkout: Path, variables: dict[str, str], reason: str) -> None:
    finished = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "wheels"],
        cwd=checkout,
        env={**os.environ, "DYNAPRUNE_NO_EXT": "", **variables},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert reason in finished.stdout
    (wheel,) = (checkout / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        facts = json.loads(archive.read("dynaprune_kernels/_build.json"))
    assert {"dynaprune_kernels/__init__.py", "dynaprune/__init__.py", "dynaprune/py.typed"} <= names
    assert "dynaprune_kernels/backends/__init__.py" in names
    assert not any(name.endswith((".so", ".cpp")) for name in names)
    assert facts["extension"] is False
    assert reason in facts["reason"]
    assert not (checkout / "dynaprune_kernels" / "_build.json").exists()
