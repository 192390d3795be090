"""Who may know of whom: ``csrc -> dynaprune_kernels -> dynaprune -> benchmarks, tests``, and inside of each.

Every import counts: at the top, inside of functions, and those for type checkers alone.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

# Each imports from itself and from what stands before it. A module belongs to the longest name that it is in.
KERNELS = (
    *("_extension", "geometry", "index", "memory_format", "placement", "averaged_slots", "index_check"),
    *("layout_tensors", "layout"),
    *("backends.memory", "reference"),
    *("backends.problem", "backends.precision", "backends.alignment", "backends.cpu", "backends.cuda"),
    *("backends.triton.kernels", "backends.triton", "backends.dispatch", "backends.pointwise", "backends"),
    *("ops", "functional", "info"),
)
LIBRARY = (
    *("nn", "families", "saving", "neurons", "pruning", "distributed", "export", "integrations"),
    *("experiment", "cli", "__main__"),
)
CORE = (
    *("device.h", "problem.h", "ptx", "mma", "scheduler", "gather", "mainloop", "epilogue", "kernels"),
    *("launchers.h", "launchers_sm90.h", "launch"),
)
# What is still against the order of LIBRARY, and which modules are still in circles: it may only get less.
AGAINST: set[str] = set()
IN_CIRCLES: set[str] = set()
FOLDERS = {"dynaprune_kernels": _ROOT, "dynaprune": _ROOT / "python", "benchmarks": _ROOT, "tests": _ROOT}


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by name; a folder's ``__init__.py`` has the folder's name."""
    top = FOLDERS[package]
    found = {}
    for path in sorted((top / package).rglob("*.py")):
        parts = path.relative_to(top).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports(path: Path) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Every import statement of a module."""
    tree = ast.parse(path.read_text())
    return tuple(node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))


def imported(name: str, path: Path) -> set[str]:
    """The names that a module imports from: ``a.b`` and ``a.b.c`` of ``from a.b import c``."""
    found = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


@functools.cache
def graph(package: str) -> dict[str, set[str]]:
    """Which modules of its own package each module imports.

    ``from a import b`` is an import of ``a`` only where ``b`` is no module of it.
    """
    known = modules(package)
    edges = {}
    for name, path in known.items():
        edges[name] = set()
        for node in imports(path):
            names = {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: expected absolute imports"
                inside = {f"{node.module}.{each}" for each in names} & known.keys()
                names = inside | ({str(node.module)} if len(inside) < len(names) else set())
            edges[name] |= names & known.keys()
    return edges


def place(name: str, package: str, order: Sequence[str]) -> int | None:
    """Where a module stands in the order of its package; None of the package itself.

    Raises:
        AssertionError: it is not in the order.
    """
    inside = name.removeprefix(package).removeprefix(".")
    if not inside:
        return None
    owners = [each for each in order if f"{inside}.".startswith(f"{each}.")]
    assert owners, f"{name} has no place in the order of {package}"
    return order.index(max(owners, key=len))


def against(package: str, order: Sequence[str]) -> list[str]:
    """The imports that go against the order. The package itself imports all, and nobody imports it."""
    wrong = []
    for name, others in graph(package).items():
        here = place(name, package, order)
        for other in sorted(others):
            there = place(other, package, order)
            if here is not None and (there is None or there > here):
                wrong.append(f"{name} -> {other}")
    return wrong


def circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    """Groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in number:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in edges[name]:
                yield sorted(group)

    for name in edges:
        if name not in number:
            yield from visit(name)


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("dynaprune_kernels", ("dynaprune", "transformers", "datasets", "benchmarks", "tests")),
        ("dynaprune", ("benchmarks", "tests")),
        ("benchmarks", ("tests",)),
    ],
)
def test_no_package_imports_one_above_it(package: str, above: tuple[str, ...]) -> None:
    wrong = [
        f"{name} -> {other}"
        for name, path in modules(package).items()
        for other in sorted(imported(name, path))
        if other.split(".")[0] in above
    ]
    assert wrong == []


def test_the_kernels_package_keeps_its_order() -> None:
    assert against("dynaprune_kernels", KERNELS) == []
    assert list(circles(graph("dynaprune_kernels"))) == []


def test_the_library_keeps_its_order() -> None:
    assert set(against("dynaprune", LIBRARY)) <= AGAINST
    assert {name for circle in circles(graph("dynaprune")) for name in circle} <= IN_CIRCLES


def includes(path: Path) -> list[str]:
    """What a C++ file includes, without brackets and quotes."""
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[Path]:
    """The C++ and CUDA files of a folder of csrc."""
    found = [path for path in sorted((_ROOT / "csrc" / folder).rglob("*")) if path.is_file()]
    assert found
    return found


@pytest.mark.parametrize(
    ("folder", "foreign"),
    [
        ("core", r"torch/|ATen/|c10/|pybind11|Python\.h|cpu/|bindings/"),
        ("cpu", r"torch/|ATen/|c10/|pybind11|Python\.h|core/|bindings/|emulation/|cuda"),
        ("bindings", r"torch/extension\.h|ATen/|c10/|Python\.h|core/(?!launchers\.h|problem\.h)"),
        ("emulation", r"torch/extension\.h|ATen/|c10/|cuda|cpu/|bindings/"),
    ],
)
def test_no_folder_of_csrc_includes_what_it_must_not_know(folder: str, foreign: str) -> None:
    wrong = [
        f"{path.relative_to(_ROOT)} -> {name}"
        for path in sources(folder)
        for name in includes(path)
        if re.match(foreign, name)
    ]
    assert wrong == []


def test_the_cuda_kernels_keep_their_order() -> None:
    def part(inside: Path | str) -> int:
        return CORE.index(Path(inside).parts[0])

    core = _ROOT / "csrc" / "core"
    wrong = [
        f"{path.relative_to(core)} -> {name}"
        for path in sources("core")
        for name in includes(path)
        if name.startswith("core/") and part(name.removeprefix("core/")) > part(path.relative_to(core))
    ]
    assert wrong == []


def test_an_import_anywhere_counts(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from a.b import C\n"
        "def f():\n    import d.e\n    from .near import g\n"
    )
    found = imported("p.q.module", path)
    assert {"a.b", "a.b.C", "d.e", "p.q.near", "p.q.near.g"} <= found


def test_a_circle_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}, "e": set()}
    assert list(circles(edges)) == [["b", "c"], ["d"]]
