"""What the packages do where the extension, triton or rich is missing, and what `info` tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynaprune_kernels import _extension, info

_ROOT = Path(__file__).resolve().parents[2]


def _run(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints, both streams together."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


_HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def test_import_knows_neither_triton_nor_the_packages_above() -> None:
    code = (
        _HIDE.format(names={"triton", "transformers", "datasets", "dynaprune"}) + "import dynaprune_kernels"
    )
    _run(code, PYTHONWARNINGS="error::ImportWarning")


def test_the_command_line_helps_without_importing_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom dynaprune.cli import app\n"
        "shown = CliRunner().invoke(app, ['compare', '--help'])\n"
        "assert shown.exit_code == 0 and '--target-sparsity' in shown.output, shown.output\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "COLUMNS": "200"})


_BACKENDS = {"cpu", "triton", "cuda", "dense", "reference"}
_FACTS = (
    "import json; from dynaprune_kernels.info import info, main; facts = info(); json.dumps(facts); "
    "print(*(f'{name}={reason}' for name, reason in facts['backends'].items()), sep='\\n'); "
    "print('TABLE', flush=True); main()"
)


def _reasons(printed: str) -> dict[str, str]:
    """Why each backend does not run here; the table that is printed names them all as well."""
    facts, _, table = printed.partition("TABLE\n")
    assert torch.__version__ in table and all(name in table for name in _BACKENDS)
    return dict(line.split("=", 1) for line in facts.splitlines() if "=" in line)


def test_import_does_not_load_triton_and_info_names_every_backend_and_the_reason() -> None:
    # torch's own FLOP counter loads triton where it is installed; nothing of ours may add to that.
    loaded = "{name for name in sys.modules if name.partition('.')[0] == 'triton'}"
    printed = _run(
        f"import sys, torch.utils.flop_counter; before = {loaded}; import dynaprune_kernels; "
        f"assert {loaded} == before; "
        "ours = 'dynaprune_kernels.backends.triton.kernels'; "
        f"assert not any(name.startswith(ours) for name in sys.modules); {_FACTS}",
        COLUMNS="200",
        DYNAPRUNE_DISABLE_EXT="0",
    )
    found = _reasons(printed)
    assert set(found) >= _BACKENDS and found["reference"] == "None"


def test_import_without_extension_and_info_without_rich() -> None:
    printed = _run(
        _HIDE.format(names={"rich"}) + "import dynaprune_kernels; from dynaprune_kernels import _extension; "
        f"status = _extension.load(); assert not status.loaded and status.path is None; {_FACTS}",
        DYNAPRUNE_DISABLE_EXT="1",
    )
    found = _reasons(printed)
    assert set(found) >= _BACKENDS and found["reference"] == "None"
    assert "DYNAPRUNE_DISABLE_EXT is set" in found["cpu"]


def test_load_failure_names_file_reason_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    monkeypatch.delenv("DYNAPRUNE_DISABLE_EXT", raising=False)
    status = _extension.load.__wrapped__()
    assert not status.loaded
    assert status.path == broken
    assert status.reason is not None
    for part in (str(broken), "could not be loaded", "pip install --no-build-isolation -e ."):
        assert part in status.reason


def test_missing_extension_gives_the_recorded_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_build.json").write_text('{"extension": false, "reason": "no C++ compiler was found"}')
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    monkeypatch.delenv("DYNAPRUNE_DISABLE_EXT", raising=False)
    status = _extension.load.__wrapped__()
    assert status.path is None
    assert status.reason is not None
    assert "no C++ compiler was found" in status.reason


def test_unreadable_build_record_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_build.json").write_text("{")
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    assert _extension.build_facts() == {}


def test_extension_loads_here() -> None:
    """Where the build recorded an extension it must load; a machine without a compiler is told why."""
    if not _extension.build_facts().get("extension"):
        pytest.skip(f"built without the extension: {_extension.load().reason}")
    if os.environ.get("DYNAPRUNE_DISABLE_EXT", "0") not in ("", "0"):
        pytest.skip("DYNAPRUNE_DISABLE_EXT is set")
    assert _extension.load().loaded, _extension.load().reason
    assert info.info()["extension"]["capability"] in {"avx512", "avx2", "neon", "generic"}


def test_no_pickle_is_read() -> None:
    """Files are read as safetensors, JSON, CSV or parquet."""
    sources = [*(_ROOT / "dynaprune_kernels").rglob("*.py"), *(_ROOT / "python").rglob("*.py")]
    assert sources
    reading = (
        "import pickle",
        "from pickle",
        "pickle.load",
        "torch.load(",
        "joblib.load",
        "allow_pickle=True",
    )
    found = [
        f"{file.relative_to(_ROOT)}: {word}"
        for file in sources
        for word in reading
        if word in file.read_text()
    ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "source", "sources"),
    [
        ("_C", "cpu/linear.cpp", info._CPU_SOURCES),
        ("_C", "layout_view.h", info._CPU_SOURCES),
        ("_C_cuda", "core/launch/linear.cu", info._CUDA_SOURCES),
        ("_C_cuda", "layout_view.h", info._CUDA_SOURCES),
    ],
)
def test_info_sees_an_outdated_extension(
    name: str, source: str, sources: tuple[str, ...], tmp_path: Path
) -> None:
    built = tmp_path / "dynaprune_kernels" / f"{name}.abi3.so"
    for file, time in ((built, 1000), (tmp_path / "csrc" / source, 2000)):
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time, time))
    assert info._stale(built, sources)
    os.utime(built, (3000, 3000))
    assert not info._stale(built, sources)
    assert not info._stale(None, sources)
