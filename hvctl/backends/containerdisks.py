"""Data volumes of containers: directories, or file systems in a file, seen at a path inside."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from xml.etree.ElementTree import Element, SubElement

from hvctl.access.agent import ExecResult
from hvctl.backends import places, rootlimits
from hvctl.backends.base import ENVIRONMENT
from hvctl.backends.disks import DiskRequest, Disks
from hvctl.errors import HostError, HvctlError, InvalidSpec, Unsupported, WrongState
from hvctl.host import Host
from hvctl.hostside import enter, files, loops, mounts, quotas, volumes
from hvctl.libvirtapi import domains
from hvctl.model import EXT4, Cache, DataDisk, DiskKind, Record, Throttle, VolumeFormat

_TOOL_TIMEOUT_S = 600


class ContainerDisks(Disks):
    """Volumes of libvirt's LXC driver."""

    grows_file_systems: ClassVar[bool] = True
    shrinks_roots: ClassVar[bool] = True

    def plan(self, host: Host, record: Record, request: DiskRequest) -> DataDisk:
        target = _check_target(record, request.target) if request.target else _choose_target(record, request)
        chosen = _new(request) if request.existing is None else _adopt(request.existing, request)
        return replace(chosen, target=target, serial="", is_read_only=request.is_read_only)

    def plan_again(self, record: Record, disk: DataDisk, *, is_trusted: bool) -> DataDisk:
        """A file system from outside is as one that a guest wrote: who made the backup may have made it, too."""
        target = _check_target(record, disk.target)
        if disk.format is VolumeFormat.RAW and not is_trusted:
            raise Unsupported(
                f"volume {disk.name!r} is a file system that this host's kernel would have to mount, and it comes from "
                "outside",
                hint="if you trust whoever made the backup: --trust; or --without-volumes",
            )
        chosen = _adopt(disk, DiskRequest(name=disk.name, is_trusted=is_trusted))
        return replace(chosen, target=target, serial="", is_read_only=disk.is_read_only)

    def add_to(self, host: Host, record: Record, domain: Element, disk: DataDisk) -> None:
        devices = domain.find("devices")
        assert devices is not None
        self.remove_from(host, record, domain, disk)
        element = SubElement(devices, "filesystem", {"type": "mount", "accessmode": "passthrough"})
        SubElement(element, "source", {"dir": str(_mount_point(host, record, disk))})
        SubElement(element, "target", {"dir": disk.target})
        if disk.is_read_only:
            SubElement(element, "readonly")

    def remove_from(self, host: Host, record: Record, domain: Element, disk: DataDisk) -> None:
        devices = domain.find("devices")
        assert devices is not None
        for element in devices.findall("filesystem"):
            source = element.find("source")
            if source is not None and source.get("dir") == str(_mount_point(host, record, disk)):
                devices.remove(element)

    def attach(self, host: Host, record: Record, disk: DataDisk) -> bool:
        controller, volume = self._controller(host, record), _volume(host, record, disk)
        if host.shell.call(volumes.is_inside, controller, volume):
            return True
        if (
            disk.is_read_only
        ):  # from inside it could be made writable again: only what is there from the start is locked
            return False
        made = self._run(host, record, "mkdir", "-p", "--", disk.target)
        if made.status != 0:
            raise HostError(
                f"cannot make {disk.target!r} in {record.name!r}: {made.stderr.decode(errors='replace').strip()[:200]}",
                hint="choose another place with --target",
            )
        host.shell.call(volumes.mount_inside, controller, volume, disk.target)
        return True

    def check_unused(self, host: Host, record: Record, disk: DataDisk, *, force: bool) -> None:
        """A file system in a file must have left this host's kernel before another may write to it."""
        if domains.is_active(_domain(host, record)):  # then the kernel knows, and `detach` is refused
            return
        device = host.shell.call(loops.find_loop, host.store.volume_content(disk.volume, disk.format))
        if device is not None:
            raise WrongState(
                f"this host's kernel still has {disk.name!r} of {record.name!r}, as {device}",
                hint=f"see who: grep {device} /proc/*/mountinfo",
            )

    def detach(self, host: Host, record: Record, disk: DataDisk) -> None:
        volume, point = _volume(host, record, disk), _mount_point(host, record, disk)
        if disk.format is not VolumeFormat.DIRECTORY and host.shell.call(files.exists, point):
            # What libvirt took in at the start stays pinned by the tree that it left behind (seen with Linux 6.18).
            raise WrongState(
                f"{record.name!r} has had {disk.name!r} from its start on: the host's kernel holds it until it is off",
                hint=f"hvctl stop {record.name}",
            )
        try:
            host.shell.call(volumes.unmount_inside, self._controller(host, record), volume)
        except HostError as error:
            raise WrongState(
                f"{record.name!r} has {disk.name!r} in use inside: it cannot be taken out now",
                hint=f"hvctl stop {record.name}",
            ) from error
        # Where it was mounted for the container: gone here, and with the directory in every other mount namespace.
        host.shell.call(mounts.unmount, point)
        host.shell.call(files.remove_directory, point)
        if host.shell.call(loops.find_loop, volume.path) is not None:
            raise WrongState(
                f"this host's kernel still holds {disk.name!r}, so nobody else may write to it",
                hint=f"hvctl stop {record.name}",
            )

    def get_root_size(self, host: Host, record: Record) -> int:
        return rootlimits.find(host, record)

    def describe_root(self, host: Host, record: Record) -> DataDisk:
        return DataDisk(
            name="root",
            kind=DiskKind.ROOT,
            format=VolumeFormat.DIRECTORY,
            source=str(host.store.layer(record.layers[-1])),
            size_bytes=self.get_root_size(host, record),
            target="/",
        )

    def check_growth(self, host: Host, record: Record, disk: DataDisk | None, size_bytes: int, is_off: bool) -> None:
        if disk is None:
            rootlimits.check_change(host, record, size_bytes)
            return
        if disk.format is VolumeFormat.DIRECTORY:
            raise Unsupported(
                f"{disk.name!r} is a directory without a size: it may use what the host's file system has",
                hint="a volume that is made with --size has one",
            )
        if not is_off:
            raise WrongState("a volume of a container grows while that is stopped", hint=f"hvctl stop {record.name}")
        self.check_unused(host, record, disk, force=False)

    def grow(self, host: Host, record: Record, disk: DataDisk | None, size_bytes: int) -> None:
        if disk is None:
            host.shell.call(quotas.limit, host.store.layer(record.layers[-1]), size_bytes)
            return
        path = host.store.volume_content(disk.volume, disk.format)
        if host.shell.call(files.size, path) < size_bytes:
            host.shell.call(volumes.make_file, path.parent, path, size_bytes)
        self._undo_growth(host, path)
        # It was checked to be whole by the kernel that mounted it; resize2fs wants to hear it from e2fsck (status 1: mended).
        checked = host.shell.run(["e2fsck", "-f", "-p", "--", path], timeout_s=_TOOL_TIMEOUT_S, check=False)
        if checked.status > 1:
            raise HostError(f"the file system of {disk.name!r} is damaged", hint=f"e2fsck -f {path}")
        undo = volumes.undo_file(path)
        try:
            host.shell.run(["resize2fs", "-z", undo, "--", path], timeout_s=_TOOL_TIMEOUT_S)
        except HvctlError:
            self._undo_growth(host, path)
            raise
        host.shell.call(files.remove, undo)

    def _undo_growth(self, host: Host, path: Path) -> None:
        """Put back what resize2fs has written before it failed or was killed: it leaves what e2fsck alone cannot mend.

        What e2undo says is nothing to go by: it complains of an end that is missing, and of a file of which nothing was used.
        """
        undo = volumes.undo_file(path)
        if host.shell.call(files.exists, undo):
            host.shell.run(["e2undo", "-f", "--", undo, path], timeout_s=_TOOL_TIMEOUT_S, check=False)
            host.shell.call(files.remove, undo)

    def grow_inside(self, host: Host, record: Record, size_bytes: int) -> bool:
        return True

    def throttle_in(self, host: Host, record: Record, domain: Element, disk: DataDisk | None, limits: Throttle) -> None:
        """Refused before it comes to that: `Backend.check_throttle`."""

    def throttle(self, host: Host, record: Record, disk: DataDisk | None, limits: Throttle) -> None:
        """Refused before it comes to that: `Backend.check_throttle`."""

    def _run(self, host: Host, record: Record, *argv: str) -> ExecResult:
        status, out, err = host.shell.call(enter.ask, self._controller(host, record), argv, ENVIRONMENT)
        return ExecResult(status=status, stdout=out, stderr=err)

    def _controller(self, host: Host, record: Record) -> int:
        return domains.get_number(_domain(host, record))


def _check_target(record: Record, target: str) -> str:
    places.check_free(target)
    taken = {disk.target for disk in record.disks} | {mount.target for mount in record.spec.mounts}
    if target in taken:
        raise InvalidSpec(f"{record.name!r} has something else at {target!r}", hint="--target /srv/OTHER")
    places.check_apart(target, taken, "--target /srv/OTHER")
    return target


def _choose_target(record: Record, request: DiskRequest) -> str:
    """Where somebody wanted to have the volume in the container that had it, if that is free here; else /srv/NAME."""
    volume = request.existing
    if volume is not None and volume.target.startswith("/") and volume.target != f"/srv/{volume.name}":
        with contextlib.suppress(InvalidSpec):
            return _check_target(record, volume.target)
    return _check_target(record, f"/srv/{request.name}")


def _new(request: DiskRequest) -> DataDisk:
    is_sized = bool(request.size_bytes)
    if request.format is VolumeFormat.DIRECTORY and is_sized:
        raise Unsupported(
            "a directory has no size of its own", hint="leave --format away: then it is a file system of that size"
        )
    if not is_sized and (request.format is VolumeFormat.RAW or request.filesystem):
        raise InvalidSpec(f"volume {request.name!r} has no size", hint="--size 10G")
    return DataDisk(
        name=request.name,
        kind=DiskKind.VOLUME,
        format=VolumeFormat.RAW if is_sized else VolumeFormat.DIRECTORY,
        size_bytes=request.size_bytes,
        filesystem=EXT4 if is_sized else "",
    )


def _adopt(volume: DataDisk, request: DiskRequest) -> DataDisk:
    """A volume that another one had."""
    if volume.format is VolumeFormat.QCOW2:
        raise Unsupported(
            f"volume {volume.name!r} is a qcow2 disk, which the host's kernel cannot mount for a container",
            hint="raw disks made with --filesystem ext4 can go to both modes",
        )
    if volume.format is VolumeFormat.RAW and volume.filesystem != EXT4:
        raise Unsupported(
            f"what is on the disk {volume.name!r} only its VM knows, and hvctl does not guess",
            hint="disks made with --filesystem ext4 can go to both modes",
        )
    if volume.is_guest_written and not request.is_trusted:
        raise Unsupported(
            f"the file system on {volume.name!r} was written by a VM: its root could have made it to attack "
            "the host's kernel, which would have to mount it",
            hint="if you trust whoever was root in there: --trust",
        )
    return replace(volume, name=request.name, cache=Cache.DEFAULT, throttle=Throttle())


def _volume(host: Host, record: Record, disk: DataDisk) -> volumes.Volume:
    path = host.store.volume_content(disk.volume, disk.format)
    return volumes.Volume(path=path, first_id=record.first_id or 0, is_read_only=disk.is_read_only)


def _mount_point(host: Host, record: Record, disk: DataDisk) -> Path:
    return host.store.container_mount(record.uuid, disk.volume)


def _domain(host: Host, record: Record) -> Any:
    return domains.get(host.connection(record.mode), record.uuid)
