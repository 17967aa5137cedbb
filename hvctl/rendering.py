"""Jinja: a template's source and values become text, in this process or in one that was begun for it.

Loading Jinja and compiling a template takes 30 to 50 ms, a tenth of a container's whole `create`. `begin` has another
process do that beside what comes first; without it, or when that process is gone, it is done here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import marshal
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

_asking = threading.Lock()
_beside: io.BufferedRWPair | None = None
"""Where the process beside this one is asked and answers."""


class RenderError(Exception):
    """What Jinja says is wrong. `is_undefined`: a name was used that has no value."""

    def __init__(self, message: str, *, is_undefined: bool) -> None:
        super().__init__(message)
        self.is_undefined = is_undefined


def begin(source: str) -> None:
    """Begin to load Jinja, and to compile a template that is likely to be asked for, in a process forked from this one.

    It ends with this one. Fine when there is one; where there are other threads, it is not safe to fork, and nothing is done.
    """
    global _beside
    with _asking:
        if _beside is not None or threading.active_count() > 1:
            return
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # no process to be had: it is done here
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            if os.fork() == 0:
                try:
                    _serve(source, theirs)
                finally:
                    os._exit(0)
            _beside = ours.makefile("rwb")


def _serve(likely: str, channel: socket.socket) -> None:
    """Answer the process that this one was forked from, until that is gone; hold nothing else that it had open."""
    os.setsid()  # Ctrl-C is for the other
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.closerange(0, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    _answer(likely, {})
    with channel.makefile("rwb") as questions:
        while True:
            source, values = marshal.load(questions)
            marshal.dump(_answer(source, values), questions)
            questions.flush()


def render(source: str, values: Mapping[str, object]) -> str:
    """The text. Raises RenderError."""
    kind, text = _ask(source, values) or _answer(source, values)
    if kind != "text":
        raise RenderError(text, is_undefined=kind == "undefined")
    return text


def _ask(source: str, values: Mapping[str, object]) -> tuple[str, str] | None:
    """The other process's answer; None without one."""
    global _beside
    with _asking:
        if _beside is None:
            return None
        try:
            marshal.dump((source, dict(values)), _beside)
            _beside.flush()
            answer: tuple[str, str] = marshal.load(_beside)
        except (OSError, EOFError, ValueError):  # it has ended, or a value is of no built-in type
            _beside = None
            return None
        return answer


def _answer(source: str, values: Mapping[str, object]) -> tuple[str, str]:
    import jinja2

    try:
        return "text", _compile(source).render(**values)
    except jinja2.UndefinedError as error:
        return "undefined", str(error.message)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        return "error", str(error)


@functools.cache
def _compile(source: str) -> jinja2.Template:
    """Compiled once in a process: `create` renders to check, and again with the address."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(source)
