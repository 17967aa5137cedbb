"""Jinja: a template's source and values become text, in this process or in one that was begun for it.

Loading Jinja and compiling a template takes 30 to 50 ms, a tenth of a container's whole `create`. `begin` has another
process do that beside what comes first; without it, or when that process is gone, it is done here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import marshal
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

_LONGEST_ANSWER_S, _LONGEST_REST_S = 10, 60
_PR_SET_PDEATHSIG = 1
_SIZE_BYTES = 4
_asking = threading.Lock()
_beside: socket.socket | None = None
"""Where the process beside this one is asked and answers."""


class RenderError(Exception):
    """What Jinja says is wrong. `is_undefined`: a name was used that has no value."""

    def __init__(self, message: str, *, is_undefined: bool) -> None:
        super().__init__(message)
        self.is_undefined = is_undefined


def begin(source: str) -> None:
    """Begin to load Jinja, and to compile a template that is likely to be asked for, in a process forked from this one.

    It ends with this one, or when it has had nothing to do for a minute. Fine when there is one; where there are other
    threads, it is not safe to fork, and nothing is done.
    """
    global _beside
    with _asking:
        if _beside is not None or threading.active_count() > 1:
            return
        with contextlib.suppress(OSError):  # no process to be had: it is done here
            ours, theirs = socket.socketpair()
            parent = os.getpid()
            with theirs:
                if os.fork() == 0:
                    try:
                        _serve(source, theirs, parent)
                    finally:
                        os._exit(0)
            ours.settimeout(_LONGEST_ANSWER_S)
            _beside = ours


def _serve(likely: str, channel: socket.socket, parent: int) -> None:
    """Answer the process that this one was forked from, until that is gone; hold nothing else that it had open."""
    os.setsid()  # Ctrl-C is for the other
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.closerange(0, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a template may never end
    if os.getppid() != parent:
        return
    _answer(likely, {})
    channel.settimeout(_LONGEST_REST_S)
    while True:
        source, values = _receive(channel)
        _send(channel, _answer(source, values))


def _send(channel: socket.socket, message: tuple[str, object]) -> None:
    """Raises OSError; ValueError for what is of no built-in type."""
    data = marshal.dumps(message)  # type: ignore[arg-type]  # what cannot be is refused
    channel.sendall(len(data).to_bytes(_SIZE_BYTES, "big") + data)


def _receive(channel: socket.socket) -> Any:
    """Raises OSError; EOFError when the other end is closed. (`marshal.load` would take a Ctrl-C for that: Python 3.11.2.)"""
    return marshal.loads(_read(channel, int.from_bytes(_read(channel, _SIZE_BYTES), "big")))


def _read(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = channel.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


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
        channel, _beside = _beside, None  # whatever happens now, its answer is never taken for the next question's
        if channel is None:
            return None
        try:
            _send(channel, (source, dict(values)))
            answer: tuple[str, str] = _receive(channel)
        except (OSError, EOFError, ValueError):  # it has ended, takes too long, or a value is of no built-in type
            channel.close()
            return None
        _beside = channel
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


def find_variables(source: str) -> frozenset[str] | None:
    """Which K a template asks for as `vars.K`; None where it uses `vars` as a whole, and so may ask for any.

    Raises RenderError for what is no template. Done here, in this process.
    """
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(autoescape=True).parse(source)
    except jinja2.TemplateError as error:
        raise RenderError(str(error), is_undefined=False) from error
    used = nodes.Name("vars", "load")
    named = [node.attr for node in tree.find_all(nodes.Getattr) if node.node == used]
    named += [
        str(node.arg.value)
        for node in tree.find_all(nodes.Getitem)
        if node.node == used and isinstance(node.arg, nodes.Const)
    ]
    is_whole = sum(node == used for node in tree.find_all(nodes.Name)) > len(named)
    return None if is_whole or any(hasattr(dict, name) for name in named) else frozenset(named)  # `vars.items()`
