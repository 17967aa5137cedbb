"""Sitting at an instance's serial console with this process's terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys

from hvctl.access import terminal
from hvctl.host import Host
from hvctl.libvirtapi import domains
from hvctl.libvirtapi.console import Console
from hvctl.model import Instance

ESCAPE = b"\x1d"
"""^] leaves, as with telnet and virsh."""
_QUIET_S = 0.5


def attach(host: Host, instance: Instance, *, force: bool) -> bool:
    """Copy between the terminal and the console until ^] (True) or until the guest's side ends (False).

    Without a terminal: types what stdin gives, shows what comes back, and leaves when both have been quiet.
    """
    connection = host.connection(instance.record.mode)
    domain = domains.get(connection, instance.record.uuid)
    is_terminal = terminal.is_interactive()
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Console(connection, domain, _show, force=force))
        if is_terminal:
            stack.enter_context(terminal.raw_mode())
        return _type(console, is_terminal)


def _show(data: bytes) -> None:
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _type(console: Console, is_terminal: bool) -> bool:
    """stdin to the console. The wait is bounded, so that the end of the guest's side is seen."""
    stdin = sys.stdin.fileno()
    while not console.ended.is_set():
        if not select.select([stdin], [], [], 0.2)[0]:
            continue
        data = os.read(stdin, 4096)
        if not data:
            console.ended.wait(_QUIET_S)
            return True
        if is_terminal and ESCAPE in data:
            console.send(data[: data.index(ESCAPE)])
            return True
        console.send(data)
    return False
