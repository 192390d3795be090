"""One writer per folder, among all processes of a machine, and an arm that ends with its comparison."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["LOCK_NAME", "FolderInUse", "end_with_parent", "note_writer", "sole_writer"]

LOCK_NAME = ".writing"
_PR_SET_PDEATHSIG = 1


class FolderInUse(ValueError):
    """Another process writes the folder."""


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[int]:
    """Hold ``folder`` (made where it does not exist) for this process while the block runs.

    Yields the lock's file descriptor. A child that inherits it holds the folder as long as it lives, even
    where this process is killed. The lock is the kernel's: nothing has to be cleared up after a kill.

    Raises:
        FolderInUse: another process writes the folder; it is named.
        OSError: a folder that cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    handle = _locked(path)
    try:
        note_writer(handle, os.getpid(), " ".join(sys.argv)[:200])
        yield handle
    finally:
        if _is(path, handle):
            path.unlink()
        os.close(handle)


def _locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = _writers(handle)
            os.close(handle)
            raise FolderInUse(
                f"{path.parent} is being written by {said}: wait for it, end it, or choose another folder"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        if _is(path, handle):
            os.ftruncate(handle, 0)
            return handle
        os.close(handle)  # its last holder has just removed it


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def note_writer(handle: int, process: int, what: str) -> None:
    """Say in the lock's file who else writes the folder.

    The lock holds without it, so a full disk is no error."""
    with contextlib.suppress(OSError):
        os.write(handle, json.dumps({"process": process, "what": what}).encode() + b"\n")


def _writers(handle: int) -> str:
    """The processes noted in the lock's file that are alive."""
    found = []
    for line in os.pread(handle, 100_000, 0).decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
            noted = json.loads(line)
            if _alive(noted["process"]):
                found.append(f"process {noted['process']} ({noted['what']})")
    return " and ".join(found) or "another process"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent, the process ``parent``, ends in any way.

    Ends the process at once where the parent has ended already. Linux only."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl")
    if os.getppid() != parent:
        os._exit(1)
