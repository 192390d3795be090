"""The heart of the pruner stays readable: short functions, short files, objects of few attributes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PRUNING = Path(__file__).resolve().parents[2] / "python" / "dynaprune" / "pruning"
LINES_OF_A_FUNCTION, LINES_OF_A_FILE, ATTRIBUTES = 60, 300, 15


def files() -> list[Path]:
    found = sorted(PRUNING.rglob("*.py"))
    assert len(found) > 40
    return found


def nodes(kind: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path, node


def test_no_function_is_long() -> None:
    long = [
        f"{path.name}: {node.name} {node.end_lineno - node.lineno + 1}"
        for path, node in nodes(ast.FunctionDef)
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 >= LINES_OF_A_FUNCTION
    ]
    assert not long


def test_no_file_is_long() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    assert not {name: count for name, count in lines.items() if count > LINES_OF_A_FILE}


def own_attributes(node: ast.ClassDef) -> set[str]:
    """What instances store: assignments to ``self``, and fields that are declared and not read-only."""
    found = {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }
    if node.name == "PruningConfig":  # its settings are read-only properties of its components
        return found
    return found | {
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and "ClassVar" not in ast.unparse(each.annotation)
    }


def test_no_object_has_many_attributes() -> None:
    from dynaprune import PruningConfig

    many = {
        node.name: len(own_attributes(node))
        for _, node in nodes(ast.ClassDef)
        if isinstance(node, ast.ClassDef) and len(own_attributes(node)) > ATTRIBUTES
    }
    assert not many
    assert len(vars(PruningConfig())) <= ATTRIBUTES


def test_nothing_hides_an_import_circle() -> None:
    assert not [path.name for path in files() if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]
