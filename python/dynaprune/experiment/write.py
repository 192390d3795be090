"""JSON, CSV and text files: written under a temporary name, then renamed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dynaprune.saving.durable import write_file
from dynaprune.saving.json_values import json_value

__all__ = ["write_csv", "write_csv_lines", "write_json", "write_text"]


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write ``text`` so that ``path`` holds either the old or the whole new content."""
    write_file(path, lambda file: file.write(text.encode("utf-8")), sync=sync)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; numbers that are not finite become null."""
    write_text(path, json.dumps(json_value(value), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` (dictionaries with the keys of the first) with a header line.

    Histories are written in every epoch: the disk is not waited for."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, buffer.getvalue(), sync=False)


def write_csv_lines(path: Path, parts: list[Path]) -> None:
    """Join CSV files with the same header line into one; those that do not exist are left out."""
    lines: list[str] = []
    for part in parts:
        if part.is_file():
            found = part.read_text(encoding="utf-8").splitlines()
            lines += found if not lines else found[1:]
    write_text(path, "\n".join(lines) + "\n" if lines else "")
