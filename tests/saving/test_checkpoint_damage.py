"""What `save` promises of its files, and what `load` says of values that no training should give."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynaprune.nn import swap_layers
from dynaprune.saving.checkpoint import load, save
from dynaprune.saving.tensor_file import read_tensors, write_tensors
from tests.fuzz.files import network as fuzzed_network
from tests.saving.checkpoint_cases import network, pruned


def tiny() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    swap_layers(model, 8, include=["0"])
    return model


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = save(tiny(), tmp_path)
    data, model = path.read_bytes(), tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for place in range(len(data)):
        bit = place % 8 if place % 3 else 5  # the bit that makes capitals of letters, in every third byte
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"expected a file written by dynaprune\.save"):
            load(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    path.write_bytes(data)
    load(model, path)
    assert not all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_the_umask_decides_the_mode(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = save(tiny(), tmp_path / "net.safetensors")
        save(tiny(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_file_and_its_name_are_on_the_disk_before_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        said.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (said.append("name"), replace(*paths)))
    save(tiny(), tmp_path)
    assert said == ["file", "name", "folder"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = [
        ".net.safetensors.123.0123abcd.tmp",
        ".net.safetensors.124.0123abcd.tmp",
        ".net.safetensors.125.0123abcd.tmp",
        ".net.safetensors.notes.tmp",
        ".other.safetensors.123.0123abcd.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("half")
        if "124" not in name:
            os.utime(tmp_path / name, (1, 1))
    with (tmp_path / names[2]).open("r+") as written:
        fcntl.flock(written, fcntl.LOCK_EX)
        save(tiny(), tmp_path / "net.safetensors")
    assert {each.name for each in tmp_path.iterdir()} == {*names[1:], "net.safetensors"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_disk_that_fails_leaves_the_old_file_alone(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tiny(), tmp_path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(f"dynaprune.saving.durable.os.{call}", fail)
        with pytest.raises(OSError, match=r"model\.safetensors"):
            save(network(), tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_another_process_and_a_full_disk_while_the_tensors_are_written(tmp_path: Path) -> None:
    """Equal models give equal bytes; under a limit on the size of files half of the tensors fit."""
    script = (
        "import resource, signal, sys; from dynaprune.saving.checkpoint import save\n"
        "from tests.fuzz.files import network as fuzzed_network\n"
        "from tests.saving.checkpoint_cases import network\n"
        "save(fuzzed_network(7), sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: save(network(), sys.argv[2])\n"
        "except OSError as error: print(error)"
    )
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    save(fuzzed_network(7), one)
    time.sleep(0.01)
    save(fuzzed_network(7), two)
    (full := tmp_path / "full").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(three), str(full / "net.safetensors")],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert one.read_bytes() == two.read_bytes() == three.read_bytes(), done.stderr
    assert "File too large" in done.stdout and "net.safetensors" in done.stdout, done.stderr
    assert not list(full.iterdir())


def values(model: nn.Module, key: str) -> torch.Tensor:
    return model.state_dict(keep_vars=True)[key].data


def test_an_intact_file_with_impossible_values_loads_with_their_names(tmp_path: Path) -> None:
    model = network()
    values(model, "0.weight")[0, 0, 0, 0] = torch.nan
    values(model, "1.running_mean")[3] = torch.nan
    values(model, "7.bias")[2] = torch.inf
    values(model, "1.running_var")[5] = -1e-3
    with pytest.warns(UserWarning) as said:
        loaded = load(network, save(model, tmp_path))
    text = [str(each.message) for each in said]
    assert any("NaN in 0.weight, 1.running_mean" in each for each in text)
    assert any("infinite values in 7.bias" in each for each in text)
    assert any("negative variances in 1.running_var" in each for each in text)
    assert all(each.filename == __file__ for each in said)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(nan=9.0), loaded.state_dict()[key].nan_to_num(nan=9.0)), key


def test_usual_values_load_without_a_word(tmp_path: Path) -> None:
    """Masks of minus infinity among the buffers included."""
    model = pruned()
    model.register_buffer("mask", torch.full((4,), -torch.inf))
    target = network()
    target.register_buffer("mask", torch.zeros(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(target, save(model, tmp_path))


KINDS = "float64 float16 bfloat16 float8_e4m3fn complex64 int64 int16 int8 uint8 uint16 bool"


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in KINDS.split()])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 3)])
def test_tensors_of_every_kind_come_back(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    made = (torch.rand(shape) * 2).to(dtype)
    given = {"a": made, "b": made.transpose(0, -1) if shape else made, "c": torch.ones(3, dtype=torch.int8)}
    write_tensors(tmp_path / "file", given, {"x": "y"})
    found = read_tensors(tmp_path / "file")
    assert found.sealed and found.metadata == {"x": "y"} and set(found.tensors) == set(given)
    for key, tensor in given.items():
        assert found.tensors[key].dtype == tensor.dtype and found.tensors[key].shape == tensor.shape
        assert found.tensors[key].tolist() == tensor.tolist()


def test_any_reader_of_safetensors_reads_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = pruned()
    found = load_file(save(model, tmp_path))
    for key, value in model.state_dict().items():
        if key in found:
            live = ~value.isnan() if value.is_floating_point() else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(found[key][live], value[live]), key


@pytest.mark.parametrize("what", ["a pipe", "an empty file", "a large empty file", "a folder"])
def test_what_is_no_file_of_ours_is_said_at_once(what: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    if what == "a pipe":
        os.mkfifo(path)
        holder = os.open(path, os.O_RDWR)
    elif what == "a folder":
        (path / "model.safetensors").mkdir(parents=True)
    else:
        path.touch()
        if what.startswith("a large"):
            os.truncate(path, 2**40)
    with pytest.raises((ValueError, OSError)):
        load(tiny, path)
    if what == "a pipe":
        os.close(holder)
