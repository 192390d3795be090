"""The README: its example runs when pasted, and every file it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import dynaprune
from dynaprune.nn import BlockSparseLayer

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    said = re.fullmatch(r"(\d+\.\d)% right with (\d+)% of the weights gone\n", printed)
    assert said is not None and float(said[1]) > 90 and int(said[2]) >= 90
    assert names["pruner"].report()["target_reached"]
    loaded = dynaprune.load(names["model"], "digits.safetensors")
    assert any(isinstance(module, BlockSparseLayer) for module in loaded.modules())


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    assert links or page != "README.md"
    missing = [link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()]
    assert missing == []


def test_make_has_the_targets_that_are_written() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)", TEXT, re.MULTILINE)
    assert named == ["demo", "test"] and set(named) <= set(targets)
