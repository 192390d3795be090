"""What SIGINT and SIGTERM do to a comparison and to its arms: both finish what they are at, and report."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["ArmInterrupts", "StopRequest", "signals_taken"]


@contextlib.contextmanager
def signals_taken(take: Callable[[int], None]) -> Iterator[None]:
    """While entered, SIGINT and SIGTERM call ``take`` with their number. In a thread that is not the main one
    nothing changes: signals do not reach it."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda number, frame: take(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class StopRequest:
    """An arm's answer: the first SIGINT and any SIGTERM are requests to stop. A second SIGINT ends the
    process at once."""

    requested: bool = False

    def take(self, number: int) -> None:
        """KeyboardInterrupt at the second SIGINT."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class ArmInterrupts:
    """A comparison's answer: it passes the interrupt on to the arm that is running, and remembers it.

    The arms run in sessions of their own, so that a Ctrl-C reaches them once and through here. The first asks
    the arm to finish its step and report; the second ends it."""

    seen: int = 0
    child: subprocess.Popen[bytes] | None = None

    def take(self, number: int) -> None:
        """Signal the running arm."""
        self.seen += 1
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM if self.seen == 1 else signal.SIGKILL)
        if self.seen == 1:
            print(
                "\ninterrupted: the running arm finishes its step and reports; once more to end it",
                file=sys.stderr,
            )
