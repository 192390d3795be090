"""Columns of a table that was read from outside: each cell is checked before anything is trained on it.

Every error is a ValueError of one line: the table, the row (from 0), the column, what was expected and what
came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow

__all__ = ["at", "categories", "class_labels", "encoded_files", "numbers", "require_columns", "texts"]


def at(origin: str, row: int, column: str) -> str:
    """How an error names a cell."""
    return f"{origin}, row {row}, column {column}"


def require_columns(table: pyarrow.Table, names: Sequence[str], origin: str) -> None:
    """ValueError unless the table has rows, and each of the columns once."""
    if missing := [name for name in names if name not in table.column_names]:
        raise ValueError(f"{origin} lacks {', '.join(missing)}: expected the columns {', '.join(names)}")
    if twice := [name for name in names if table.column_names.count(name) > 1]:
        raise ValueError(f"{origin} has the column {twice[0]} {table.column_names.count(twice[0])} times")
    if table.num_rows == 0:
        raise ValueError(f"{origin} is empty: expected rows, got the columns only")


def _refuse_nulls(table: pyarrow.Table, column: str, origin: str, expected: str) -> None:
    cells = table.column(column)
    if cells.null_count:
        row = int(np.flatnonzero(cells.is_null().to_numpy())[0])
        raise ValueError(f"{at(origin, row, column)}: expected {expected}, got an empty cell")


def class_labels(
    table: pyarrow.Table, column: str, classes: int, origin: str, *, all_classes: bool = True
) -> np.ndarray:
    """Labels 0 to ``classes - 1``, int64 ``[n]``.

    Raises:
        ValueError: a label that is missing, NaN, fractional or out of range; a single class, or (with
            ``all_classes``) a class that no row has."""
    import pyarrow.types as types

    require_columns(table, [column], origin)
    expected = f"labels 0 to {classes - 1}"
    kind = table.column(column).type
    if types.is_dictionary(kind) or not (types.is_integer(kind) or types.is_floating(kind)):
        raise ValueError(f"{origin}, column {column}: expected {expected} as numbers, got {kind}")
    _refuse_nulls(table, column, origin, expected)
    found = table.column(column).to_numpy()
    whole = found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = ~((whole >= 0) & (whole < classes) & (whole == np.floor(whole)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{at(origin, row, column)}: expected {expected}, got {found[row]}")
    labels = found.astype(np.int64)
    there = np.unique(labels)
    if len(there) < 2:
        raise ValueError(f"{origin}, column {column}: expected several classes, got {there[0]} in every row")
    if all_classes and len(there) < classes:
        absent = sorted(set(range(classes)) - set(there.tolist()))
        raise ValueError(f"{origin}, column {column}: expected rows of each class, got none of {absent[:10]}")
    return labels


def numbers(table: pyarrow.Table, column: str, origin: str, *, whole: bool = False) -> np.ndarray:
    """Numbers of at least 0, float64 ``[n]``, NaN where a cell is empty.

    Raises:
        ValueError: text, a negative or infinite number, or with ``whole`` a fraction."""
    import pyarrow.types as types

    kind = table.column(column).type
    expected = f"a {'whole ' if whole else ''}number of at least 0"
    cells = table.column(column)
    if types.is_null(kind):
        return np.full(table.num_rows, np.nan)
    if types.is_integer(kind) or types.is_floating(kind):
        found = cells.cast("float64", safe=False).to_numpy()
    else:
        found = np.empty(table.num_rows)
        for row, cell in enumerate(cells.to_pylist()):
            try:
                found[row] = np.nan if cell is None or cell == "" else float(cell)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{at(origin, row, column)}: expected {expected}, got {str(cell)[:40]!r}"
                ) from None
    with np.errstate(invalid="ignore"):
        wrong = (found < 0) | np.isinf(found)
        if whole:
            wrong |= ~np.isnan(found) & (found != np.floor(found))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{at(origin, row, column)}: expected {expected}, got {found[row]}")
    return found


def categories(table: pyarrow.Table, column: str, origin: str) -> list[str]:
    """The cells of a column as names; "unknown" where one is empty.

    Raises:
        ValueError: a column of neither texts nor numbers, or bytes that are no text."""
    import pyarrow.types as types

    kind = table.column(column).type
    if types.is_null(kind):
        return ["unknown"] * table.num_rows
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        cells = table.column(column).to_pylist()
    else:
        cells = texts(table, column, origin, nulls=True)
    return ["unknown" if cell is None or cell != cell or cell == "" else str(cell) for cell in cells]


def texts(table: pyarrow.Table, column: str, origin: str, *, nulls: bool = False) -> list[Any]:
    """The texts of a column; with ``nulls`` None where a cell is empty.

    Raises:
        ValueError: another kind of column, an empty cell, or bytes that are no text."""
    import pyarrow.types as types

    kind = table.column(column).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_null(kind) and nulls:
        return [None] * table.num_rows
    if not (types.is_string(inner) or types.is_large_string(inner)):
        raise ValueError(f"{origin}, column {column}: expected texts, got {kind}")
    if not nulls:
        _refuse_nulls(table, column, origin, "a text")
    try:
        return table.column(column).to_pylist()
    except UnicodeDecodeError:
        for row, cell in enumerate(table.column(column)):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{at(origin, row, column)}: expected a text, got {error}") from None
        raise


def encoded_files(table: pyarrow.Table, column: str, origin: str) -> list[bytes]:
    """The bytes of each file in a column as the hub has them: structs with an entry ``bytes``.

    Raises:
        ValueError: another kind of column, or a file without bytes."""
    import pyarrow.types as types

    kind = table.column(column).type
    names = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    if names.count("bytes") != 1 or not (
        types.is_binary(kind.field("bytes").type) or types.is_large_binary(kind.field("bytes").type)
    ):
        raise ValueError(f"{origin}, column {column}: expected files (a struct with bytes), got {kind}")
    found = [cell and cell["bytes"] for cell in table.column(column).to_pylist()]
    for row, data in enumerate(found):
        if not data:
            raise ValueError(f"{at(origin, row, column)}: expected a file's bytes, got none")
    return found
