"""The effects that steps of the disk verbs are made of, each from the record alone and each doable twice.

Which disk it is about, an operation's arguments say: whole, since before the commit of `disk-add` and after that of
`disk-remove` the record does not have it.
"""

from __future__ import annotations

from hvctl import metadata
from hvctl.backends import get_backend
from hvctl.errors import NotFound
from hvctl.host import Host
from hvctl.instances import effects, volumes
from hvctl.libvirtapi import domains
from hvctl.model import DataDisk, DiskKind, Record, Throttle
from hvctl.operation import arguments_of

ROOT = "root"
"""What the root disk is called where data disks have names."""


def discard_made(host: Host, record: Record) -> None:
    """Remove the volume that an addition made; one that was there before stays."""
    if arguments_of(record)["made"] == "yes":
        volumes.discard(host, arguments_of(record)["volume"])


def attach(host: Host, record: Record) -> None:
    """Give the running instance the disk (again)."""
    if is_on(host, record):
        get_backend(record.mode).disks.attach(host, record, disk_of(record))


def detach(host: Host, record: Record) -> None:
    """Take the disk away from the running instance (again)."""
    if is_on(host, record):
        get_backend(record.mode).disks.detach(host, record, disk_of(record))


def let_go(host: Host, record: Record) -> None:
    """Remove a volume that was taken out, or write down that nobody has it now."""
    disk = disk_of(record)
    if disk.kind is not DiskKind.VOLUME:
        return
    if arguments_of(record)["keep"] == "yes":
        volumes.note(host, disk, record.name)
    else:
        volumes.discard(host, disk.volume)


def let_all_go(host: Host, record: Record) -> None:
    """Remove every volume of an instance that is being deleted, or keep it, as was asked."""
    for disk in record.disks:
        if disk.kind is not DiskKind.VOLUME:
            continue
        if arguments_of(record).get("keep") == "yes":
            volumes.note(host, disk, record.name)
        else:
            volumes.discard(host, disk.volume)


def discard_all(host: Host, record: Record) -> None:
    """Remove the volumes that were made for an instance that is not to be."""
    for disk in record.disks:
        volumes.discard(host, disk.volume)


def grow(host: Host, record: Record) -> None:
    """Make the disk as large as the record says."""
    arguments = arguments_of(record)
    disk = find_disk(record, arguments["name"])
    get_backend(record.mode).disks.grow(host, record, disk, int(arguments["size"]))
    if disk is not None and disk.kind is DiskKind.VOLUME:
        volumes.note(host, disk, record.name)


def throttle(host: Host, record: Record) -> None:
    """Limit the disk of the running instance as was asked."""
    if is_on(host, record):
        arguments = arguments_of(record)
        limits = Throttle(iops=int(arguments["iops"]), bytes_per_s=int(arguments["bytes"]))
        get_backend(record.mode).disks.throttle(host, record, find_disk(record, arguments["name"]), limits)


def find_disk(record: Record, name: str) -> DataDisk | None:
    """The data disk of this name; None is the root. Raises NotFound."""
    if name == ROOT:
        return None
    for disk in record.disks:
        if disk.name == name:
            return disk
    raise NotFound(
        f"{record.name!r} has no disk {name[:80]!r}", hint=f"see which it has: hvctl disk list {record.name}"
    )


def disk_of(record: Record) -> DataDisk:
    """The disk that an operation is about."""
    return metadata.parse_disk(arguments_of(record))


def is_on(host: Host, record: Record) -> bool:
    """Whether the instance is active now."""
    return domains.is_active(effects.get_domain(host, record))
