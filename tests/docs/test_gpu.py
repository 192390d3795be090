"""The page about the first contact with a GPU: its commands exist, and its times are those of the calls."""

from __future__ import annotations

import re
from pathlib import Path

from tests.gpu.calls import CALLS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_commands_and_times_are_those_of_the_calls() -> None:
    told = dict(re.findall(r"^make gpu-(\w+) +# (\d+) minutes", PAGE, re.MULTILINE))
    assert {name: int(minutes) * 60 for name, minutes in told.items()} == {
        name: limit for name, (limit, _) in CALLS.items()
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, (limit, _) in CALLS.items():
        assert re.search(rf"^gpu-{name}:  ## .*, {limit // 60} minutes$", makefile, re.MULTILINE)
        assert f"-m tests.gpu {name}\n" in makefile
        assert re.search(rf"^\| {name} \|", PAGE, re.MULTILINE)


def test_limits_of_single_parts_are_those_that_run(tmp_path: Path) -> None:
    parts = {part.name: part for part in CALLS["parity"][1](tmp_path, None)}
    assert {part.seconds for part in parts.values() if part.together} == {40}
    assert "40 seconds each" in PAGE and "60 seconds per test" in PAGE
    assert "--timeout=60" in parts["tests-cuda"].command
