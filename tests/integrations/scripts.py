"""The usage examples of docstrings, as code to run."""

from __future__ import annotations

import re
import textwrap
from typing import Any


def run_example(docstring: str | None, names: dict[str, Any]) -> dict[str, Any]:
    """Run the first indented block after ``::`` with these names; return all names after it."""
    assert docstring is not None
    lines = docstring.split("\n")
    start = next(number for number, line in enumerate(lines) if line.endswith("::"))
    body = lines[start + 1 :]
    indent = re.match(r" *", next(line for line in body if line.strip()))
    assert indent is not None and len(indent[0]) >= 4
    block = []
    for line in body:
        if line.strip() and not line.startswith(indent[0]):
            break
        block.append(line)
    code = textwrap.dedent("\n".join(block))
    assert 8 <= sum(bool(line.strip()) for line in code.split("\n")) <= 14
    exec(compile(code, "<docstring>", "exec"), names)
    return names
