"""Going into a running instance: exec and console (ssh needs only its endpoint, see `query.get_endpoint`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvctl.access import console as terminal_console
from hvctl.access.agent import STDIN_LIMIT_BYTES, ExecResult
from hvctl.backends import get_backend
from hvctl.errors import UsageError
from hvctl.host import Host
from hvctl.instances import query

__all__ = ["STDIN_LIMIT_BYTES", "attach", "console", "exec_"]

# Root's shell, unless that lets nobody in, and what there is where there is none.
_SHELL = """
shell=
while IFS=: read -r _ _ uid _ _ _ found; do [ "$uid" != 0 ] || { shell=$found; break; }; done 2>/dev/null </etc/passwd
cd 2>/dev/null
case $shell in */nologin | */false) shell= ;; esac
[ -x "$shell" ] || shell=$(command -v bash || command -v sh)
exec "$shell" -l
"""


def exec_(host: Host, name: str, argv: Sequence[str], stdin: bytes = b"") -> ExecResult:
    """Run a command as root inside, without the network.

    Raises WrongState unless it runs, UsageError for too much input, GuestFailed or TimedOut when the guest is mute.
    """
    if not argv:
        raise UsageError("there is no command to run", hint=f"hvctl exec {name} -- COMMAND")
    instance = query.get_running(host, name)
    return get_backend(instance.record.mode).run_inside(host, instance.record, tuple(argv), stdin)


def attach(host: Host, name: str, argv: Sequence[str], *, with_terminal: bool | None = None) -> int:
    """Run a command, or root's login shell, as root inside with this process's stdin, stdout and stderr; its exit status.

    `with_terminal` None: with one when there is a person and the mode can; a shell, when somebody types. Raises Unsupported
    where it was asked for and cannot be, and what `exec_` raises.
    """
    instance = query.get_running(host, name)
    if not argv:
        argv = ("sh", "-c", _SHELL)
        with_terminal = True if with_terminal is None and sys.stdin.isatty() else with_terminal
    return get_backend(instance.record.mode).attach(host, instance.record, tuple(argv), with_terminal=with_terminal)


def console(host: Host, name: str, *, force: bool = False) -> bool:
    """Sit at the serial console; True when the user left it, False when the guest's side ended.

    `force` sends away whoever has it. Raises Unsupported where libvirt cannot.
    """
    instance = query.get_running(host, name)
    if force:
        get_backend(instance.record.mode).check_takeover()
    return terminal_console.attach(host, instance, force=force)
