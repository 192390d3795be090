"""Files that are there whole or not at all: written aside, brought to the disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["cannot_write", "write_file"]

_LEFT_SECONDS = 60


def write_file(path: Path, write: Callable[[BinaryIO], Any], *, sync: bool = True) -> None:
    """Let ``write`` fill a new file beside ``path``, then give it that name.

    ``path`` holds the old content or the whole new one at any moment. Its mode is what the umask leaves of
    0666. Nothing is left behind where ``write`` raises; what a killed process has left beside ``path`` is
    removed.

    Args:
        sync: wait until the content and the name are on the disk, so that a power cut loses neither.

    Raises:
        OSError: a disk that is full or read-only, a folder that does not exist. ``filename`` is ``path``.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        handle = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_what_was_left(path)
            with open(handle, "wb") as file:
                write(file)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def _remove_what_was_left(path: Path) -> None:
    """Files aside that nobody writes any more: a minute old, and not locked."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+\.[0-9a-f]{{8}}\.tmp")
    left: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:  # a folder that cannot be listed
        left = [Path(each.path) for each in entries if ours.fullmatch(each.name)]
    for each in left:
        with contextlib.suppress(OSError):
            if time.time() - each.stat().st_mtime < _LEFT_SECONDS:
                continue
            handle = os.open(each, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                each.unlink()
            finally:
                os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(error: OSError) -> str:
    """One line for people on a file that could not be written."""
    said = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"cannot write {error.filename}: {said}" if error.filename is not None else f"cannot write: {said}"
