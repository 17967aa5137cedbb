"""Logging in and running commands over ssh, with this process's own stdin, stdout and stderr."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hvctl import sshclient
from hvctl.access import keys, terminal
from hvctl.errors import GuestFailed
from hvctl.model import Endpoint

_CHUNK_BYTES = 64 * 1024


def format_command(words: Sequence[str]) -> str | None:
    """The command line for the other side: one word is a shell line, as with OpenSSH; several are kept as they are."""
    if not words:
        return None
    return words[0] if len(words) == 1 else shlex.join(words)


def run(endpoint: Endpoint, words: Sequence[str], *, with_terminal: bool | None = None) -> int:
    """Run a command, or a shell where there are no words, on this process's stdin, stdout and stderr.

    Gives the command's own exit status; 255 when a signal ended it, as with OpenSSH. With a terminal on both ends where this side
    has one and there is no command (or as told). Raises what `sshclient.connect` raises.
    """
    command = format_command(words)
    is_terminal = terminal.is_interactive() and command is None if with_terminal is None else with_terminal
    with sshclient.connect(endpoint, key_files()) as transport:
        if is_terminal and sys.stdin.isatty():
            return _run_in_terminal(transport, command)
        channel = sshclient.open_command(transport, command, None)
        return _pump(channel, sys.stdin.fileno(), sys.stdout.buffer, sys.stderr.buffer)


def capture(endpoint: Endpoint, words: Sequence[str], into: BinaryIO) -> int:
    """Run a command without input and write its stdout to a file; gives its exit status."""
    with sshclient.connect(endpoint, key_files()) as transport, Path(os.devnull).open("rb") as nothing:
        channel = sshclient.open_command(transport, format_command(words), None)
        return _pump(channel, nothing.fileno(), into, sys.stderr.buffer)


def key_files() -> list[Path]:
    """Private keys to try, hvctl's own first: every instance made by this user knows it."""
    return [keys.own_key_path(), *sorted(path.with_suffix("") for path in (Path.home() / ".ssh").glob("id_*.pub"))]


def _run_in_terminal(transport: Any, command: str | None) -> int:
    columns, lines = terminal.size()
    channel = sshclient.open_command(transport, command, (terminal.name(), columns, lines))

    def resize(columns: int, lines: int) -> None:
        with contextlib.suppress(OSError, EOFError):
            channel.resize_pty(columns, lines)

    with terminal.raw_mode(), terminal.on_resize(resize):
        return _pump(channel, sys.stdin.fileno(), sys.stdout.buffer, sys.stderr.buffer)


def _pump(channel: Any, stdin: int, stdout: BinaryIO, stderr: BinaryIO) -> int:
    """Copy both ways until the command has ended and everything it wrote is here; never more than a window in memory."""
    ended = threading.Event()
    wake_read, wake_write = os.pipe()
    sender = threading.Thread(target=_send, args=(channel, stdin, wake_read, ended), daemon=True)
    errors = threading.Thread(target=_copy, args=(channel.recv_stderr, stderr), daemon=True)
    sender.start()
    errors.start()
    try:
        _copy(channel.recv, stdout)
        errors.join()
        status = channel.recv_exit_status()
    except BrokenPipeError:
        channel.close()  # whoever reads our output is gone
        return 141  # 128 + SIGPIPE, as a shell says it
    finally:
        ended.set()
        os.write(wake_write, b"x")
        sender.join(timeout=1)
        os.close(wake_write)
        os.close(wake_read)
    if status >= 0:
        return int(status)
    if channel.get_transport().is_active():
        return 255
    raise GuestFailed("the ssh connection ended before the command did", hint="is the guest still running? hvctl list")


def _copy(receive: Any, stream: BinaryIO) -> None:
    while chunk := receive(_CHUNK_BYTES):
        stream.write(chunk)
        stream.flush()


def _send(channel: Any, stdin: int, wake: int, ended: threading.Event) -> None:
    """stdin to the channel until its end, or until the command has ended; sendall waits for the window."""
    with contextlib.suppress(OSError, EOFError):
        while not ended.is_set():
            ready, _, _ = select.select([stdin, wake], [], [])
            if wake in ready:
                return
            chunk = os.read(stdin, _CHUNK_BYTES)
            if not chunk:
                channel.shutdown_write()
                return
            channel.sendall(chunk)
