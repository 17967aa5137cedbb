"""This side's terminal: raw while somebody is inside, and always put back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
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
    """Call `tell(columns, lines)` whenever the terminal's size changes (SIGWINCH)."""

    def handle(_signal: int, _frame: object) -> None:
        tell(*size())

    before = signal.signal(signal.SIGWINCH, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


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
