"""This side's terminal: raw while somebody is inside, and always put back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def raw_mode() -> Iterator[None]:
    """stdin in raw mode for the block: every key, Ctrl-C too, goes to the other side."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def on_resize(tell: Callable[[int, int], None]) -> Iterator[None]:
    """Call `tell(columns, lines)`, in a thread, when the terminal's size has changed (SIGWINCH); once for a burst.

    The signal's handler itself runs in the middle of anything, also of what holds a lock that `tell` wants.
    """
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)

    def handle(_signal: int, _frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(wake_write, b".")

    def follow() -> None:
        with open(wake_read, "rb", buffering=0) as wakes, contextlib.suppress(OSError):  # the terminal may go away
            while wakes.read(4096):
                tell(*size())

    threading.Thread(target=follow, daemon=True).start()
    before = signal.signal(signal.SIGWINCH, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(wake_write)


def size() -> tuple[int, int]:
    """Columns and lines of the terminal itself; never what COLUMNS said when the process began."""
    columns, lines = os.get_terminal_size(sys.stdin.fileno())
    return columns, lines


def name() -> str:
    """What TERM says."""
    return os.environ.get("TERM", "xterm")


def is_interactive() -> bool:
    """Whether there is a person: stdin and stdout are both terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()
