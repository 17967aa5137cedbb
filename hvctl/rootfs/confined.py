"""Programs that read what comes from outside, run in the sandbox: their limits, and what their end means."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hvctl.errors import CommandFailed, HostError, HvctlError, InvalidSpec, TimedOut
from hvctl.host import Host
from hvctl.hostside import refusal, sandbox
from hvctl.shell import Completed
from hvctl.shell.base import Argument
from hvctl.units import GIB, MIB, TIB, format_duration, format_size
from hvctl.values import dataclass

_NOT_FOUND = 127
_SIGABRT, _SIGKILL, _SIGSEGV, _SIGXCPU, _SIGXFSZ = (128 + number for number in (6, 9, 11, 24, 25))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one thing from outside may come to."""

    entries: int = 2_000_000
    expanded_bytes: int = 64 * GIB
    ratio: int = 1000
    """Expanded bytes for each byte of what came; more is a bomb."""
    ratio_floor_bytes: int = 256 * MIB
    """Where the ratio begins to matter."""
    depth: int = 200
    path_bytes: int = 2048
    reserve_bytes: int = 256 * MIB
    """What stays free in the store: guests that run need it."""
    file_bytes: int = 64 * GIB
    """The longest file; a disk's, or one of a tree."""
    virtual_bytes: int = 16 * TIB
    virtual_ratio: int = 1_000_000
    """Of a disk's size to its file's, from 4 TiB on."""
    output_bytes: int = 16 * MIB
    """What a program may have to say."""
    wall_s: float = 3600
    cpu_s: int = 3600
    memory_bytes: int = 2 * GIB


DEFAULTS = Limits()


def run_confined(
    host: Host,
    directory: Path,
    argv: Sequence[Argument],
    *,
    read_only: Sequence[Path] = (),
    devices: Sequence[str] = (),
    capabilities: Sequence[str] = (),
    limits: Limits = DEFAULTS,
    check: bool = True,
    tell: Callable[[float], None] | None = None,
) -> Completed:
    """Run a program that reads untrusted data; it sees `directory` as /work, where it starts, and each file as /in/N.

    `tell` gets how far `qemu-img -p` is, from 0 to 1. Without capabilities it writes only what is root's; it can read
    each of the files. Raises as Shell.run does; with `check`, InvalidSpec when it ran into one of its limits or crashed,
    and HostError when there is no bubblewrap.
    """
    if not capabilities and not all(host.shell.call(sandbox.is_plainly_readable, path) for path in read_only):
        capabilities = sandbox.READ_ANY_OWNER
    confinement = sandbox.Confinement(
        directory=directory,
        read_only=tuple((path, sandbox.place_input(number)) for number, path in enumerate(read_only)),
        devices=tuple(devices),
        capabilities=tuple(capabilities),
        cpu_s=limits.cpu_s,
        memory_bytes=limits.memory_bytes,
        file_bytes=limits.file_bytes,
    )
    words = [str(limits.output_bytes), *(os.fspath(word) for word in argv)]
    command = sandbox.python_command(confinement, "supervise", words)

    def on_line(line: str) -> None:
        host.pause(0)
        share = line.removeprefix(refusal.PERCENT)
        if tell is not None and share != line and share.isdigit():
            tell(int(share) / 100)

    done = wait_for(host, command, f"{argv[0]!r} failed", limits, on_line)
    if check and done.status != 0:
        raise explain(done, f"{argv[0]!r} failed", limits)
    return done


def wait_for(
    host: Host, command: Sequence[str], attempt: str, limits: Limits, on_line: Callable[[str], None] | None = None
) -> Completed:
    """Run a confined command to its end, whatever that is. Raises TimedOut, and what `on_line` does."""
    try:
        return host.shell.run(command, timeout_s=limits.wall_s, check=False, on_line=on_line)
    except TimedOut as error:
        reason = f"it took more than {format_duration(limits.wall_s)}"
        raise TimedOut(f"{attempt}: {reason}", hint="try again when less is going on here") from error


def explain(done: Completed, attempt: str, limits: Limits) -> HvctlError:
    """The error that the end of a confined program means."""
    reports = (refusal.PROGRESS, refusal.PERCENT)
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(reports)]
    last = "; ".join(lines[-3:]) or f"it ended with {done.status}"
    if lines and (lines[-1].startswith("bwrap: ") or done.status == _NOT_FOUND):
        return HostError(f"{attempt}: {last}", hint="confinement needs the package bubblewrap: hvctl host doctor")
    reason = {
        refusal.REFUSED: last,
        _SIGXCPU: f"it took more than {format_duration(limits.cpu_s)} of CPU time",
        _SIGXFSZ: f"it came to a file of more than {format_size(limits.file_bytes)}",
        **dict.fromkeys((_SIGABRT, _SIGKILL, _SIGSEGV), "the program that reads it crashed"),
    }.get(done.status)
    if reason is not None:
        return InvalidSpec(f"{attempt}: {reason}", hint="get it again, or from somebody else")
    has_no_space = done.status == refusal.UNABLE or "No space left" in done.stderr
    hint = "free some space: hvctl image list; hvctl gc" if has_no_space else ""
    return CommandFailed(f"{attempt}: {last}", hint=hint, status=done.status, stderr=done.stderr)
