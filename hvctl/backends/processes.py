"""What both modes do alike for applications: what their init is given, its status, and what the process printed."""

from __future__ import annotations

from hvctl.backends.base import Secrets
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.libvirtapi import networks
from hvctl.model import Record
from hvctl.rootfs import application
from hvctl.values import dataclass

_STATUS_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Status:
    """What an application's init has told since its last start."""

    has_started: bool = False
    exit_code: int | None = None
    """None while it runs, and when its init could not tell."""


def read_status(host: Host, record: Record) -> Status:
    """What became of the process; nothing of what stands there is more than the instance's own word."""
    path = host.store.output(record.uuid) / "status"
    if not host.shell.call(files.exists, path):
        return Status()
    status = Status()
    for line in (
        host.shell.call(files.read_file, path, limit_bytes=_STATUS_LIMIT_BYTES).decode(errors="replace").splitlines()
    ):
        word, _, rest = line.strip().partition(" ")
        if word == "started":
            status = Status(has_started=True)
        elif word == "exit" and rest.isascii() and rest.isdigit():
            status = Status(has_started=True, exit_code=int(rest) % 256)
    return status


def read_log(host: Host, record: Record, *, limit_bytes: int) -> bytes:
    """The end of what the process printed, the part that was put aside when the log grew long included."""
    found = b""
    for name in ("log", "log.1", "log.0"):  # the init's, virtlogd's
        path = host.store.output(record.uuid) / name
        if len(found) < limit_bytes and host.shell.call(files.exists, path):
            found = host.shell.call(files.read_tail, path, limit_bytes=limit_bytes - len(found)) + found
    return found


def format_files(host: Host, record: Record, secrets: Secrets) -> dict[str, bytes]:
    """What its init is given, its network looked up: file -> content."""
    assert secrets.process is not None
    network = application.Network()
    if record.address:
        gateway, prefix = networks.get_subnet(host.connection(record.mode), record.network)
        network = application.Network(address=record.address, prefix=prefix, gateway=gateway)
    return application.format_files(
        record, secrets.process, secrets.process_ids, network, has_terminal=secrets.has_terminal
    )
