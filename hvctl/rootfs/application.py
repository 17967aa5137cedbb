"""Application images: one process instead of a system. What is to run, as whom, and how its init is told.

An application's init (`guest/application/init`) is the same in both modes, and so are the files that it is given: here
they are made. They may hold secrets (`--env`), so they are its root's alone, and nothing of them is in the record.
"""

from __future__ import annotations

import io
import re
import shlex
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hvctl.errors import HostError, InvalidSpec
from hvctl.host import Host
from hvctl.hostside import machine
from hvctl.model import Image, Process, Record
from hvctl.values import dataclass

HERE = "/dev/hvctl"
"""Where the init finds everything, in both modes: in `/dev`, which is no part of the image."""
GRACE_S = 10
"""How long a process has after its stop signal, as Docker gives it."""
_IN_TERMINAL = """
. /dev/hvctl/application/settings
/dev/hvctl/busybox chown "$uid" "$(/dev/hvctl/busybox tty)"
cd "$directory" && . /dev/hvctl/application/start
"""
START = (f"{HERE}/busybox", "sh", "-c", _IN_TERMINAL)
"""The command that becomes the process, in a terminal, which is then its user's."""
# Debian's busybox takes the name of one of its own applets for that, before it looks along PATH: it is given a path.
_FIND_PROGRAM = """\
program=
case $name in */*) program=$name ;; esac
set -f
IFS=:
for folder in $path; do
    [ -z "$program" ] || break
    if [ -f "${folder:-.}/$name" ] && [ -x "${folder:-.}/$name" ]; then program=${folder:-.}/$name; fi
done
if [ -z "$program" ]; then
    echo "exec: '$name': not found" >&2
    exit 127
fi
"""
_GUEST = Path(__file__).parent / "guest" / "application"
_ACCOUNTS_LIMIT_BYTES = 4 * 1024**2
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS = {
    "busybox": ("/usr/bin/busybox", "/bin/busybox", "/usr/sbin/busybox"),
    "gosu": ("/usr/sbin/gosu", "/usr/bin/gosu", "/usr/local/bin/gosu"),
}
_LARGEST_ID = 65_535


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a user wants otherwise than the image says."""

    environment: tuple[tuple[str, str], ...] = ()
    entrypoint: tuple[str, ...] | None = None
    """Replaces the image's, whose command then goes with it; empty: none."""
    command: tuple[str, ...] = ()
    user: str = ""
    """`user`, `uid`, `user:group` or `uid:gid`; empty: the image's."""
    terminal: str = ""
    """What TERM says where its process is started from outside, with a terminal; empty: its init starts it."""

    @property
    def are_any(self) -> bool:
        return bool(self.environment or self.command or self.user) or self.entrypoint is not None


@dataclass(frozen=True, kw_only=True)
class Network:
    """Where it is on the network; empty for none."""

    address: str = ""
    prefix: int = 0
    gateway: str = ""


def resolve(image: Image, wishes: Wishes) -> Process:
    """The image's process with what the user wants. Raises InvalidSpec when nothing is left to run."""
    process = image.process
    assert process is not None
    entrypoint, command = process.entrypoint, process.command
    if wishes.entrypoint is not None:
        entrypoint, command = wishes.entrypoint, ()
    environment = {**dict(process.environment), **dict(wishes.environment)}
    if wishes.terminal:
        environment = {"TERM": wishes.terminal, **environment}
    process = replace(
        process,
        entrypoint=entrypoint,
        command=wishes.command or command,
        environment=tuple(environment.items()),
        user=wishes.user or process.user,
    )
    words = [*process.entrypoint, *process.command]
    if not words:
        raise InvalidSpec(f"image {image.name!r} names no command to run", hint="say one: ... -- COMMAND")
    if any("\0" in text for text in (*words, *(part for pair in process.environment for part in pair))):
        raise InvalidSpec("a word of the command has a NUL character", hint="remove it")
    return process


def find_program(host: Host, name: str) -> str:
    """Where a static program of the host's lies; the usual place when it is not there."""
    return host.shell.call(machine.find_file, _PROGRAMS[name])


def check_programs(host: Host) -> None:
    """Raise HostError unless the programs are there that run inside every application, and stand alone."""
    for name in _PROGRAMS:
        path = find_program(host, name)
        if not host.shell.call(machine.is_static, Path(path)):
            raise HostError(
                f"an application needs {name}, statically linked, and {path!r} is none",
                hint="apt-get install busybox-static gosu",
            )


def find_ids(host: Host, image: Image, process: Process) -> tuple[int, int]:
    """Uid and gid of the process's user, from the image's own accounts. Raises InvalidSpec when there is no such user."""
    tree = host.store.image_tree(image.id)
    user, _, group = process.user.partition(":")
    uid, gid = _find_id(host, tree, "etc/passwd", user, image.name) if user else (0, 0)
    if group:
        gid, _none = _find_id(host, tree, "etc/group", group, image.name)
    if not (0 <= uid <= _LARGEST_ID and 0 <= gid <= _LARGEST_ID):
        raise InvalidSpec(
            f"image {image.name!r} runs as {process.user!r}, beyond id {_LARGEST_ID}", hint="--user says another"
        )
    return uid, gid


def format_files(
    record: Record, process: Process, ids: tuple[int, int], network: Network, *, has_terminal: bool = False
) -> dict[str, bytes]:
    """What the init is given: file -> content. `has_terminal`: it leaves the process to whoever runs START."""
    settings = {
        "directory": process.directory or "/",
        "stop_signal": process.stop_signal.removeprefix("SIG"),
        "grace_s": str(GRACE_S),
        "uid": str(ids[0]),
        "gid": str(ids[1]),
        "is_attached": "terminal" if has_terminal else "yes" if record.spec.is_ephemeral else "no",
        "address": network.address,
        "prefix": str(network.prefix),
        "gateway": network.gateway,
    }
    lines = [f"{key}={shlex.quote(value)}" for key, value in settings.items()]
    return {
        "init": (_GUEST / "init").read_bytes(),
        "settings": "\n".join([*lines, ""]).encode(),
        "start": _format_start(process).encode(),
        "resolv.conf": f"nameserver {network.gateway}\n".encode() if network.gateway else b"",
        **format_names(record, network.address),
    }


def format_names(record: Record, address: str) -> dict[str, bytes]:
    """The files that hold its name."""
    own = f"{address} {record.name}\n" if address else ""
    return {
        "hostname": f"{record.name}\n".encode(),
        "hosts": f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{own}".encode(),
    }


def mode_of(name: str) -> int:
    """The mode of a file that the init is given: three are for everybody inside, the rest may hold secrets."""
    return {"init": 0o750, "hostname": 0o644, "hosts": 0o644, "resolv.conf": 0o644}.get(name, 0o640)


def pack(content: Mapping[str, bytes]) -> bytes:
    """Files as a tar archive, root's."""
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode_of(name)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def parse_signal(name: str) -> str:
    """`SIGTERM` for `SIGTERM`, `TERM` or `15`; SIGTERM for what is no signal (as Docker does)."""
    text = name.strip().upper()
    if text.isdigit() and 0 < int(text) < signal.NSIG:
        return signal.Signals(int(text)).name if int(text) in set(signal.Signals) else "SIGTERM"
    text = text if text.startswith("SIG") else f"SIG{text}"
    return text if text in signal.Signals.__members__ else "SIGTERM"


def _format_start(process: Process) -> str:
    """Shell that becomes the process: an empty environment, the user, then its own environment and words.

    `gosu` reads accounts as Docker does, inside, with no more rights than the instance has; HOME is from there.
    """
    environment = {"PATH": _PATH, **dict(process.environment)}
    busybox, words = f"{HERE}/busybox", [*process.entrypoint, *process.command]
    argv = [
        *(busybox, "env", "-i", f"{HERE}/gosu", process.user or "0"),
        *(busybox, "env", *(f"{key}={value}" for key, value in environment.items())),
    ]
    wanted = f"name={shlex.quote(words[0])} path={shlex.quote(environment['PATH'])}"
    return f'{wanted}\n{_FIND_PROGRAM}exec {shlex.join(argv)} "$program" {shlex.join(words[1:])}\n'


def _find_id(host: Host, tree: Path, name: str, wanted: str, image: str) -> tuple[int, int]:
    """(uid, gid) from `etc/passwd`, (gid, _) from `etc/group`; a number need not be there."""
    from hvctl.rootfs import intake

    content = intake.read_in_tree(host, tree, name, limit_bytes=_ACCOUNTS_LIMIT_BYTES) or b""
    for line in content.decode(errors="replace").splitlines():
        fields = line.split(":")
        if len(fields) < 4 or not re.fullmatch(r"\d{1,10}", fields[2], re.ASCII):
            continue
        if wanted in (fields[0], fields[2]):
            second = int(fields[3]) if re.fullmatch(r"\d{1,10}", fields[3], re.ASCII) else 0
            return int(fields[2]), second
    if re.fullmatch(r"\d{1,10}", wanted, re.ASCII):
        return int(wanted), 0
    raise InvalidSpec(f"image {image!r} has no {wanted[:80]!r} in its /{name}", hint="--user says another")
