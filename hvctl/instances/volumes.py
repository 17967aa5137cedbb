"""Volumes: data of hvctl's own that may outlive an instance, each a directory of the store that describes itself.

Whose a volume is, only records say. `volume.json` holds what is to be known of one that nobody has; it is written last,
so a directory without it was never whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from hvctl import metadata, operation
from hvctl.errors import HostError, InvalidSpec, NotFound
from hvctl.host import Host
from hvctl.hostside import files, volumes
from hvctl.model import Cache, DataDisk, Record, Throttle, VolumeFormat
from hvctl.shell.base import Argument
from hvctl.units import format_size
from hvctl.values import dataclass

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_SCHEMA = 1
_QEMU_IMG_TIMEOUT_S = 60
_MKE2FS_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume that no instance has."""

    disk: DataDisk
    """As it was when its last owner had it, without what was that one's only; its place there is kept."""
    last_owner: str
    """The name of the instance that had it last."""

    @property
    def id(self) -> str:
        return self.disk.volume


def make(host: Host, disk: DataDisk, owner: str) -> None:
    """Make a volume and what describes it; one that was half made is made anew."""
    store, call = host.store, host.shell.call
    folder, content = store.volume(disk.volume), store.volume_content(disk.volume, disk.format)
    words: list[Argument]
    if disk.format is VolumeFormat.DIRECTORY:
        call(volumes.make_directory, folder, content)
    elif disk.format is VolumeFormat.RAW:
        call(volumes.make_file, folder, content, disk.size_bytes)
    else:
        call(files.make_directory, folder, 0o711)
        words = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            disk.format.value,
            "--",
            content,
            str(disk.size_bytes),
        ]
        host.shell.run(words, timeout_s=_QEMU_IMG_TIMEOUT_S)
        call(files.set_mode, content, 0o600)
    if disk.filesystem:
        # Blocks of 4 KiB whatever the size: a small one can grow. The label is at most 16 bytes.
        words = [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            disk.filesystem,
            "-b",
            "4096",
            "-m",
            "0",
            "-L",
            disk.name[:16],
            "--",
            content,
        ]
        host.shell.run(words, timeout_s=_MKE2FS_TIMEOUT_S)
    note(host, disk, owner)


def check_size(host: Host, size_bytes: int) -> None:
    """Raise InvalidSpec for a size that no file of the store can have."""
    if not host.shell.call(volumes.can_hold, host.store.volumes, size_bytes):
        raise InvalidSpec(
            f"a volume of {format_size(size_bytes)} is not possible: no file can be so large on the file system of "
            f"{str(host.store.volumes)!r}",
            hint="give it less",
        )


def note(host: Host, disk: DataDisk, owner: str) -> None:
    """Write down what is to be known of a volume when nobody has it."""
    kept = replace(disk, serial="", is_read_only=False, cache=Cache.DEFAULT, throttle=Throttle())
    facts = {"schema": _SCHEMA, "last_owner": owner, "disk": metadata.format_disk(kept)}
    content = (json.dumps(facts, indent=2) + "\n").encode()
    host.shell.call(files.write_file, host.store.volume_facts(disk.volume), content, 0o600)


def discard(host: Host, volume_id: str) -> None:
    """Remove a volume with all that is in it; fine when it is gone. What describes it goes first."""
    host.shell.call(files.remove, host.store.volume_facts(check_id(volume_id)))
    host.shell.call(files.remove, host.store.volume(volume_id))


def check_id(volume_id: str) -> str:
    """The identifier, if it is one: it becomes part of a path."""
    if not _ID.fullmatch(volume_id):
        raise InvalidSpec(f"{volume_id[:80]!r} is no identifier of a volume", hint="hvctl disk list --unattached")
    return volume_id


def list_owned(host: Host) -> set[str]:
    """Identifiers of all volumes that a record names, also one that libvirt has lost, or one of a change under way."""
    from hvctl.instances.recovery import list_lost  # here: it knows the verbs, and they know us

    records: list[Record] = [instance.record for instance in host.instances()] + list_lost(host)
    owned = {disk.volume for record in records for disk in record.disks}
    return (owned | {operation.arguments_of(record).get("volume", "") for record in records}) - {""}


def list_unattached(host: Host) -> list[Volume]:
    """Whole volumes that nobody has, by name. Raises HostError unless both drivers answered."""
    owned = list_owned(host)
    names = host.shell.call(files.list_names, host.store.volumes)
    found = [read(host, name) for name in names if name not in owned and is_whole(host, name)]
    return sorted(found, key=lambda volume: (volume.disk.name, volume.id))


def is_whole(host: Host, volume_id: str) -> bool:
    """Whether a directory of the store is a volume that was made to its end."""
    return bool(_ID.fullmatch(volume_id)) and host.shell.call(files.exists, host.store.volume_facts(volume_id))


def read(host: Host, volume_id: str) -> Volume:
    """The volume of this identifier. Raises HostError when what describes it is damaged."""
    path = host.store.volume_facts(check_id(volume_id))
    try:
        facts = json.loads(host.read_text(path))
        if facts["schema"] != _SCHEMA:
            raise HostError(f"volume {volume_id!r} was made by another hvctl", hint="upgrade hvctl on this machine")
        disk = metadata.parse_disk(facts["disk"])
        return Volume(disk=replace(disk, volume=volume_id), last_owner=str(facts["last_owner"]))
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(
            f"{str(path)!r} is damaged: {error}", hint=f"its data is beside it: ls {path.parent}"
        ) from error


def get_unattached(host: Host, text: str) -> Volume:
    """The volume that nobody has with this name, or the beginning of its identifier.

    Raises NotFound, and InvalidSpec with the identifiers when several have the name.
    """
    volumes_ = list_unattached(host)
    found = [volume for volume in volumes_ if volume.disk.name == text]
    found = found or [volume for volume in volumes_ if len(text) >= 4 and volume.id.startswith(text)]
    if not found:
        raise NotFound(f"there is no unattached volume {text[:80]!r}", hint="hvctl disk list --unattached")
    if len(found) > 1:
        several = ", ".join(f"{volume.id[:8]} (last of {volume.last_owner})" for volume in found)
        raise InvalidSpec(f"{len(found)} unattached volumes are called {text!r}: {several}", hint="give the identifier")
    return found[0]
