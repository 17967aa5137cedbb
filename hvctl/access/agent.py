"""Running a command in a VM without the network: by the QEMU guest agent.

The agent runs a program and keeps its output until it is asked for; so input is given whole, output comes whole at the
end, and there is no terminal.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from hvctl.errors import GuestFailed, UsageError
from hvctl.libvirtapi import agent
from hvctl.values import dataclass

STDIN_LIMIT_BYTES = 1024 * 1024
_PING_TIMEOUT_S = 5
_CONNECT_TIMEOUT_S = 10
_CALL_TIMEOUT_S = 30
_FIRST_PAUSE_S = 0.005
# Longer messages arrive damaged ("JSON parse error", QEMU 7.2's agent behind libvirt 9.0), after half a minute.
_CHUNK_BYTES = 48 * 1024
# $0 is the file, the rest the command: it reads a file that has no name any more.
_WITH_FILE = 'exec 9<"$0" && rm -f -- "$0" && exec "$@" <&9 9<&-'
_LONGEST_PAUSE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """A command that ended inside: its exit status (128 + signal when a signal ended it) and its whole output."""

    status: int
    stdout: bytes
    stderr: bytes


def ping(domain: Any, *, timeout_s: int = _PING_TIMEOUT_S) -> None:
    """Return when the agent answers. Raises GuestFailed or TimedOut."""
    agent.command(domain, "guest-ping", {}, timeout_s=timeout_s)


def freeze(domain: Any, *, timeout_s: int) -> None:
    """Let the guest write everything and hold its file systems. Raises GuestFailed or TimedOut: then it may be frozen."""
    agent.command(domain, "guest-fsfreeze-freeze", {}, timeout_s=timeout_s)


def thaw(domain: Any, *, timeout_s: int) -> bool:
    """Let the guest's file systems go; whether none is held any more. Raises GuestFailed or TimedOut."""
    agent.command(domain, "guest-fsfreeze-thaw", {}, timeout_s=timeout_s)
    return bool(agent.command(domain, "guest-fsfreeze-status", {}, timeout_s=timeout_s) == "thawed")


def set_clock(domain: Any, now_ns: int) -> None:
    """Set the guest's clock. Raises GuestFailed or TimedOut."""
    agent.command(domain, "guest-set-time", {"time": now_ns}, timeout_s=_PING_TIMEOUT_S)


def run(
    domain: Any,
    argv: tuple[str, ...],
    environment: Mapping[str, str],
    stdin: bytes,
    pause: Callable[[float], None],
) -> ExecResult:
    """Run a program as root, found by PATH, its arguments as they are; return when it has ended.

    Raises UsageError for more than 1 MiB of input, GuestFailed when the agent is away or cut the output (16 MiB each).
    """
    if len(stdin) > STDIN_LIMIT_BYTES:
        raise UsageError("exec in a VM takes at most 1 MiB on stdin", hint="pipe it through: hvctl ssh NAME -- ...")
    _wait_for_agent(domain, pause)
    identifier = _start(domain, argv, environment, stdin)
    pause_s = _FIRST_PAUSE_S
    while True:
        answer = agent.command(domain, "guest-exec-status", {"pid": identifier}, timeout_s=_CALL_TIMEOUT_S)
        if answer["exited"]:
            return _result(answer, argv)
        pause(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


def _wait_for_agent(domain: Any, pause: Callable[[float], None]) -> None:
    """Right after a boot, sshd answers a moment before the agent does: give it that moment."""
    deadline_s = time.monotonic() + _CONNECT_TIMEOUT_S
    while True:
        try:
            return ping(domain)
        except GuestFailed:
            if time.monotonic() > deadline_s:
                raise
        pause(_LONGEST_PAUSE_S)


def _start(domain: Any, argv: tuple[str, ...], environment: Mapping[str, str], stdin: bytes) -> int:
    """The agent's number of the process. `env` finds the program by PATH and tells 126 and 127 apart, as a shell does."""
    words = ["/usr/bin/env", *argv] if "=" not in argv[0] else ["/bin/sh", "-c", 'exec "$0" "$@"', *argv]
    variables = [f"{name}={value}" for name, value in environment.items()]
    arguments: dict[str, object] = {"env": variables, "capture-output": True}
    if len(stdin) > _CHUNK_BYTES:
        words = ["/bin/sh", "-c", _WITH_FILE, _write_file(domain, stdin), *words]
    elif stdin:
        arguments["input-data"] = base64.b64encode(stdin).decode()
    arguments |= {"path": words[0], "arg": words[1:]}
    return int(agent.command(domain, "guest-exec", arguments, timeout_s=_CALL_TIMEOUT_S)["pid"])


def _write_file(domain: Any, content: bytes) -> str:
    """A file of the guest's /run (0600, as the agent makes them) with this content; whoever reads it removes it."""
    path = f"/run/hvctl-stdin-{os.urandom(8).hex()}"
    handle = agent.command(domain, "guest-file-open", {"path": path, "mode": "w"}, timeout_s=_CALL_TIMEOUT_S)
    for start in range(0, len(content), _CHUNK_BYTES):
        chunk = base64.b64encode(content[start : start + _CHUNK_BYTES]).decode()
        arguments = {"handle": handle, "buf-b64": chunk}
        agent.command(domain, "guest-file-write", arguments, timeout_s=_CALL_TIMEOUT_S)
    agent.command(domain, "guest-file-close", {"handle": handle}, timeout_s=_CALL_TIMEOUT_S)
    return path


def _result(answer: dict[str, Any], argv: tuple[str, ...]) -> ExecResult:
    if answer.get("out-truncated") or answer.get("err-truncated"):
        raise GuestFailed(
            f"the output of {argv[0]!r} was cut by the guest agent at 16 MiB", hint="use ssh for that much output"
        )
    status = answer["exitcode"] if "exitcode" in answer else 128 + int(answer.get("signal", 0))
    return ExecResult(
        status=int(status),
        stdout=base64.b64decode(answer.get("out-data", "")),
        stderr=base64.b64decode(answer.get("err-data", "")),
    )
