"""Tables that are not what a task expects: one line with table, row and column before anything is trained."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from dynaprune.cli import app
from dynaprune.experiment.tasks import Split, get_task

Table = pyarrow.Table
Change = Callable[[Table], Table]


def titanic(rows: int = 60) -> Table:
    each = range(rows)
    return pyarrow.table(
        {
            "Survived": [i % 2 for i in each],
            "Pclass": [1 + i % 3 for i in each],
            "Name": [f"Doe, {'Mr' if i % 3 else 'Mrs'}. {i}" for i in each],
            "Sex": ["male" if i % 3 else "female" for i in each],
            "Age": [None if i % 7 == 0 else 20.0 + i for i in each],
            "SibSp": [i % 3 for i in each],
            "Parch": [i % 2 for i in each],
            "Ticket": [f"A {i}" for i in each],
            "Fare": [7.25 + i for i in each],
            "Cabin": [None if i % 2 else f"C{i}" for i in each],
            "Embarked": ["S" if i % 4 else None for i in each],
        }
    )


def png(seed: int, side: int = 32, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def files(contents: list[Any]) -> Any:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([c if c is None else {"bytes": c, "path": None} for c in contents], kind)


def cifar10(rows: int = 100, first: int = 0) -> Table:
    images = files([png(first + i) for i in range(rows)])
    return pyarrow.table({"img": images, "label": [i % 10 for i in range(rows)]})


def imdb(rows: int = 60, first: int = 0) -> Table:
    texts = [f"a {'good' if i % 2 else 'bad'} film of number {first + i} " * 5 for i in range(rows)]
    return pyarrow.table({"text": texts, "label": [i % 2 for i in range(rows)]})


def wav(seed: int, frames: int = 2400, rate: int = 8000, subtype: str = "PCM_16") -> bytes:
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, frames)
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def fsdd(rows: int = 100, first: int = 0) -> Table:
    sounds = files([wav(first + i) for i in range(rows)])
    return pyarrow.table({"audio": sounds, "label": [i % 10 for i in range(rows)]})


def common_voice(rows: int = 60, first: int = 0) -> Table:
    return pyarrow.table(
        {
            "audio": files([wav(first + i) for i in range(rows)]),
            "sentence": [f"one and two {i}" for i in range(rows)],
            "locale": [("de", "en", "fr")[i % 3] for i in range(rows)],
        }
    )


MADE: dict[str, tuple[str, dict[str, Callable[[], Table]]]] = {
    "titanic": ("titanic", {"train": titanic}),
    "cifar10": ("cifar10", {"train": cifar10, "test": lambda: cifar10(30, 1000)}),
    "imdb": ("imdb", {"train": imdb, "test": lambda: imdb(20, 1000)}),
    "lm": ("imdb", {"train": imdb, "test": lambda: imdb(20, 1000)}),
    "spoken_digits": ("fsdd", {"train": fsdd, "test": lambda: fsdd(20, 1000)}),
    "common_voice": ("common_voice", {"train": common_voice, "test": lambda: common_voice(20, 1000)}),
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "cifar10": ("--width", "0.25"),
    "imdb": ("--size", "tiny"),
    "lm": ("--size", "tiny", "--context", "8"),
    "spoken_digits": ("--size", "tiny"),
    "common_voice": ("--size", "tiny"),
}


def write(root: Path, task: str, **changes: Change) -> Path:
    folder, parts = MADE[task]
    (root / folder).mkdir()
    for part, make in parts.items():
        parquet.write_table(changes.get(part, lambda t: t)(make()), root / folder / f"{part}.parquet")
    return root


def cell(column: str, row: int, value: Any, kind: Any = None) -> Change:
    """The table with one cell changed (and the column's type, where the value needs another)."""

    def change(table: Table) -> Table:
        cells = table.column(column).to_pylist()
        cells[row] = value
        wanted = kind or (pyarrow.float64() if isinstance(value, float) else table.schema.field(column).type)
        place = table.column_names.index(column)
        return table.set_column(place, column, pyarrow.array(cells, wanted))

    return change


def column(name: str, values: Callable[[int], Any]) -> Change:
    return lambda t: t.set_column(t.column_names.index(name), name, values(t.num_rows))


def file_in(row: int, content: Any) -> Change:
    def change(table: Table) -> Table:
        name = "img" if "img" in table.column_names else "audio"
        contents = [c["bytes"] for c in table.column(name).to_pylist()]
        contents[row] = content(contents[row]) if callable(content) else content
        return table.set_column(table.column_names.index(name), name, files(contents))

    return change


def twice(name: str) -> Change:
    return lambda t: t.append_column(name, t.column(name))


def invalid_text(table: Table) -> Table:
    data = [f"film {i}".encode() for i in range(table.num_rows)]
    data[7] = b"\xff\xfe film"
    return table.set_column(0, "text", pyarrow.array(data, pyarrow.binary()).view(pyarrow.string()))


def huge_png(_: bytes) -> bytes:
    """A picture of one colour, 20,000 pixels wide and high."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


NAN, INF = float("nan"), float("inf")
LABELS: dict[str, tuple[Change, str]] = {
    "a fraction": (cell("{}", 5, 0.5), "train.parquet, row 5, column {}: expected labels 0 to .*, got 0.5"),
    "NaN": (cell("{}", 6, NAN), "row 6, column {}: expected labels .*, got nan"),
    "infinite": (cell("{}", 6, INF), "row 6, column {}: expected labels .*, got inf"),
    "negative": (cell("{}", 7, -1), "row 7, column {}: expected labels .*, got -1"),
    "out of range": (cell("{}", 8, 99), "row 8, column {}: expected labels .*, got 99"),
    "null": (cell("{}", 9, None), "row 9, column {}: expected labels .*, got an empty cell"),
    "one class": (column("{}", lambda n: pyarrow.array([1] * n)), "expected several classes, got 1 in every"),
    "text": (column("{}", lambda n: pyarrow.array(["0", "1"] * (n // 2))), "expected labels .* got string"),
    "truth": (column("{}", lambda n: pyarrow.array([True, False] * (n // 2))), "as numbers, got bool"),
    "times": (column("{}", lambda n: pyarrow.array([0] * n, pyarrow.date32())), "as numbers, got date32"),
    "no column": (lambda t: t.drop_columns(["{}"]), "lacks {}: expected the columns"),
    "a column twice": (twice("{}"), "has the column {} 2 times"),
    "no rows": (lambda t: t.slice(0, 0), "is empty: expected rows"),
    "few rows": (
        lambda t: t.slice(0, 3),
        r"cannot split 3 rows|expected rows of each class|expected several",
    ),
}
OWN: dict[str, dict[str, tuple[Change, str]]] = {
    "titanic": {
        "age as text": (cell("Age", 3, "old", pyarrow.string()), "x"),
        "negative age": (
            cell("Age", 4, -1.0),
            "row 4, column Age: expected a number of at least 0, got -1.0",
        ),
        "infinite fare": (cell("Fare", 5, INF), "row 5, column Fare: .*got inf"),
        "negative siblings": (cell("SibSp", 6, -2), "row 6, column SibSp: expected a whole number"),
        "half a parent": (cell("Parch", 7, 0.5), "row 7, column Parch: expected a whole number .*got 0.5"),
        "no name": (cell("Name", 8, None), "row 8, column Name: expected a text, got an empty cell"),
        "names as numbers": (
            column("Name", lambda n: pyarrow.array(range(n))),
            "column Name: expected texts",
        ),
        "sex as bytes": (column("Sex", lambda n: pyarrow.array([b"m"] * n)), "column Sex: expected texts"),
    },
    "cifar10": {
        "no image": (file_in(3, b"no image"), "image in cifar10/train.parquet, row 3, column img"),
        "a cut image": (file_in(4, lambda b: b[:200]), "row 4, column img, got "),
        "a broken image": (file_in(5, lambda b: b[:60] + bytes(80) + b[140:]), "row 5, column img, got "),
        "an empty image": (file_in(6, b""), "row 6, column img: expected a file's bytes, got none"),
        "a missing image": (file_in(7, None), "row 7, column img: expected a file's bytes, got none"),
        "another size": (file_in(8, png(1, 33)), r"got \(33, 33\) in cifar10/train.parquet, row 8"),
        "a huge image": (file_in(9, huge_png), "row 9, column img"),
        "a cut JPEG": (file_in(10, png(1, kind="JPEG")[:300]), "row 10, column img, got OSError"),
        "PostScript": (file_in(11, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n"), "row 11, column"),
        "paths": (column("img", lambda n: pyarrow.array(["a"] * n)), "column img: expected files"),
    },
    "imdb": {
        "no text": (cell("text", 3, None), "row 3, column text: expected a text, got an empty cell"),
        "numbers": (
            column("text", lambda n: pyarrow.array(range(n))),
            "column text: expected texts, got int64",
        ),
        "invalid text": (invalid_text, "row 7, column text: expected a text, got .*utf-8"),
        "a cut vocabulary": (twice("text"), "has the column text 2 times"),
    },
    "lm": {
        "no text": (cell("text", 3, None), "row 3, column text: expected a text, got an empty cell"),
        "invalid text": (invalid_text, "row 7, column text: expected a text, got .*utf-8"),
        "one text": (column("text", lambda n: pyarrow.array(["a film"] * n)), "at least two training texts"),
        "no rows": (lambda t: t.slice(0, 0), "is empty: expected rows"),
        "short texts": (
            lambda t: pyarrow.table({"text": list("abcdefghijklmno")}),
            "expected text of more than 8 tokens for a block, got 3",
        ),
    },
    "spoken_digits": {
        "no sound": (file_in(3, b"no sound"), "fsdd/train.parquet, row 3, column audio: expected the bytes"),
        "half a header": (file_in(4, lambda b: b[:20]), "row 4, column audio: expected"),
        "an empty sound": (file_in(5, b""), "row 5, column audio: expected a file's bytes, got none"),
        "too short": (file_in(6, lambda b: wav(1, 100)), "row 6, column audio: expected clips of at least"),
        "a rate of 1 Hz": (file_in(7, lambda b: wav(1, 5000, 1)), "row 7, column audio: .*got 1 Hz"),
        "NaN": (file_in(8, lambda b: wav(1, 2400, 8000, "FLOAT")[:-8] + b"\xff" * 8), "row 8, .*finite"),
    },
    "common_voice": {
        "no sentence": (cell("sentence", 3, None), "x"),
        "no locale": (cell("locale", 4, None), "row 4, column locale: expected a text, got an empty cell"),
        "one locale": (column("locale", lambda n: pyarrow.array(["en"] * n)), "expected several languages"),
        "numbers": (column("locale", lambda n: pyarrow.array(range(n))), "column locale: expected texts"),
        "no sound": (file_in(5, b"\0" * 50), "common_voice/train.parquet, row 5, column audio: expected"),
        "no column": (lambda t: t.drop_columns(["locale"]), "lacks locale: expected the columns audio"),
        "no rows": (lambda t: t.slice(0, 0), "is empty: expected rows"),
    },
}
OWN["titanic"]["age as text"] = (
    lambda t: t.set_column(4, "Age", pyarrow.array(["old" if i == 3 else "4" for i in range(t.num_rows)])),
    "row 3, column Age: expected a number of at least 0, got 'old'",
)
LABEL_COLUMN = {"titanic": "Survived", "cifar10": "label", "imdb": "label", "spoken_digits": "label"}


def refused(task: str, root: Path, *more: str) -> str:
    """What the command line says: one line, and nothing is left."""
    out = root / "out"
    given = ["train", task, "--arm", "baseline", "--data", str(root), "--out", str(out), "--quiet"]
    done = CliRunner().invoke(app, [*given, *OPTIONS.get(task, ()), *more])
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not list(out.rglob("*"))
    return done.stderr


@pytest.mark.parametrize("task", list(MADE))
def test_the_tables_as_they_should_be_load(task: str, tmp_path: Path) -> None:
    chosen = dict(get_task(task).options)
    chosen.update({k: v for k, v in (("width", 0.25), ("size", "tiny"), ("context", 8)) if k in chosen})
    data = get_task(task).load(Split(0, source=str(write(tmp_path, task))), chosen)
    assert min(data.description["sizes"]) > 0


def damage_of_labels() -> list[Any]:
    return [pytest.param(task, name, id=f"{task}-{name}") for task in LABEL_COLUMN for name in LABELS]


@pytest.mark.parametrize(("task", "name"), damage_of_labels())
def test_labels_that_are_none(task: str, name: str, tmp_path: Path) -> None:
    label = LABEL_COLUMN[task]
    change, said = LABELS[name]

    def named(table: Table) -> Table:
        changed = change(table.rename_columns(["{}" if n == label else n for n in table.column_names]))
        return changed.rename_columns([label if n == "{}" else n for n in changed.column_names])

    found = refused(task, write(tmp_path, task, train=named))
    assert re.search(said.replace("{}", label), found), found


@pytest.mark.parametrize(
    ("task", "name"), [pytest.param(t, n, id=f"{t}-{n}") for t, cases in OWN.items() for n in cases]
)
def test_cells_that_are_not_of_their_column(task: str, name: str, tmp_path: Path) -> None:
    change, said = OWN[task][name]
    more = ("--objective", "ctc") if (task, name) == ("common_voice", "no sentence") else ()
    if more:
        said = "row 3, column sentence: expected a text, got an empty cell"
    found = refused(task, write(tmp_path, task, train=change), *more)
    assert re.search(said, found), found


@pytest.mark.parametrize("task", [t for t, (_, parts) in MADE.items() if "test" in parts])
def test_the_test_part_is_checked_too(task: str, tmp_path: Path) -> None:
    _, parts = MADE[task]
    same = refused(task, write(tmp_path, task, test=lambda t: parts["train"]()))
    assert re.search(r"the same \d+ (rows|reviews) as the training part", same), same
    for each in tmp_path.rglob("test.parquet"):
        each.unlink()
    assert "expected the table" in refused(task, tmp_path) and "test.parquet" in refused(task, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_no_table(content: bytes, tmp_path: Path) -> None:
    root = write(tmp_path, "titanic")
    (root / "titanic" / "train.parquet").write_bytes(content)
    assert "expected a parquet table in " in refused("titanic", root)


def test_a_table_that_was_cut_or_overwritten(tmp_path: Path) -> None:
    root = write(tmp_path, "titanic")
    path = root / "titanic" / "train.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "expected a parquet table in " in refused("titanic", root)
    path.write_bytes(data[:4] + bytes(200) + data[204:])
    assert "titanic" in refused("titanic", root)


def test_a_locale_of_the_test_part_alone(tmp_path: Path) -> None:
    root = write(tmp_path, "common_voice", test=cell("locale", 2, "tlh"))
    found = refused("common_voice", root)
    assert "common_voice/test.parquet, row 2, column locale: expected one of de, en, fr" in found


def test_a_comparison_says_it_in_one_line_too(tmp_path: Path, capfd: Any) -> None:
    root = write(tmp_path, "titanic", train=cell("Survived", 5, 0.5))
    out = root / "out"
    done = CliRunner().invoke(app, ["compare", "titanic", "--data", str(root), "--out", str(out), "--quiet"])
    said = capfd.readouterr().err
    assert done.exit_code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert "titanic/train.parquet, row 5, column Survived: expected labels 0 to 1, got 0.5" in said
    assert not done.stderr and not list(out.iterdir())
