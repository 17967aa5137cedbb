"""Data disks of VMs: virtio block devices, plugged in and out while the guest runs."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from hvctl.access import agent
from hvctl.backends.base import ENVIRONMENT
from hvctl.backends.disks import DiskRequest, Disks
from hvctl.errors import GuestFailed, HostError, HvctlError, InvalidSpec, NotFound, Unsupported, WrongState
from hvctl.host import Host
from hvctl.hostside import diskfiles, files
from hvctl.libvirtapi import disks, domains, survey
from hvctl.model import Cache, DataDisk, DiskKind, Provision, Record, Throttle, VolumeFormat
from hvctl.shell.base import Argument
from hvctl.units import TIB, format_size

_QEMU_IMG_TIMEOUT_S = 60
_BYTES, _IOPS = "total_bytes_sec", "total_iops_sec"
_DETACH_TIMEOUT_S = 20
_PING_TIMEOUT_S = 2
_LARGEST_BYTES = 16 * TIB
# What virtio-blk hands to a guest as its serial number: 20 bytes (virtio 1.2, 5.2.6.4).
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,19}", re.ASCII)
_TARGET = re.compile(r"vd[b-y]", re.ASCII)
_RESERVED_SERIALS = ("root", "seed")

# $1: bytes. The kernel inside may learn of the new size a moment after QEMU has told it.
_GROW = """
tries=0
until [ $(($(cat /sys/class/block/vda/size) * 512)) -ge "$1" ]; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || { echo "vda has not grown" >&2; exit 1; }
    sleep 0.1
done
exec systemctl restart hvctl-grow.service
"""


class VmDisks(Disks):
    """Disks of libvirt's QEMU driver."""

    grows_file_systems: ClassVar[bool] = False

    def plan(self, host: Host, record: Record, request: DiskRequest) -> DataDisk:
        serial = _check_serial(record, request.serial or request.name[:20])
        target = disks.find_free_target(_domain(host, record))
        if not target:
            raise WrongState(
                f"{record.name!r} has as many disks as a VM can have", hint=f"hvctl disk list {record.name}"
            )
        if request.existing is not None:
            chosen = _adopt(request.existing, request)
        elif request.iso:
            chosen = _foreign(request, DiskKind.ISO, _check_iso(host, record, request.iso))
        elif request.device:
            chosen = _foreign(request, DiskKind.DEVICE, _check_device(host, record, request))
        else:
            chosen = _new(request)
        return replace(
            chosen,
            target=target,
            serial=serial,
            is_read_only=request.is_read_only or bool(request.iso),
            is_guest_written=bool(chosen.filesystem),
            cache=request.cache,
            has_discard=request.has_discard,
            throttle=request.throttle,
        )

    def plan_again(self, record: Record, disk: DataDisk, *, is_trusted: bool) -> DataDisk:
        if disk.format is VolumeFormat.DIRECTORY or not _TARGET.fullmatch(disk.target):
            raise InvalidSpec(f"{disk.name!r} cannot be a disk of a VM", hint="restore another backup")
        if disk.target in {other.target for other in record.disks}:
            raise InvalidSpec(f"two disks are {disk.target!r}", hint="restore another backup")
        return replace(disk, serial=_check_serial(record, disk.serial), is_guest_written=bool(disk.filesystem))

    def add_to(self, host: Host, record: Record, domain: Element, disk: DataDisk) -> None:
        devices = domain.find("devices")
        assert devices is not None
        self.remove_from(host, record, domain, disk)
        devices.append(_format(host, disk))

    def remove_from(self, host: Host, record: Record, domain: Element, disk: DataDisk) -> None:
        devices, element = domain.find("devices"), disks.find_element(domain, _path(host, disk))
        if devices is not None and element is not None:
            devices.remove(element)

    def attach(self, host: Host, record: Record, disk: DataDisk) -> bool:
        domain = _domain(host, record)
        if disks.find(domain, _path(host, disk)) is None:
            return disks.attach(domain, _format(host, disk))
        return True

    def check_unused(self, host: Host, record: Record, disk: DataDisk, *, force: bool) -> None:
        """By the guest's own word: it would let go of a mounted disk, and lose what it has not written yet."""
        domain = _domain(host, record)
        if force or not domains.is_active(domain):
            return
        try:
            agent.ping(domain, timeout_s=_PING_TIMEOUT_S)
            argv = ("lsblk", "--noheadings", "--output", "MOUNTPOINT", f"/dev/disk/by-id/virtio-{disk.serial}")
            said = agent.run(domain, argv, ENVIRONMENT, b"", host.pause).stdout.decode(errors="replace").split()
        except HvctlError:  # no agent: nobody who could say
            return
        if said:
            raise WrongState(
                f"{record.name!r} has {disk.name!r} mounted at {', '.join(said[:4])}",
                hint=f"hvctl exec {record.name} -- umount {said[0]}, or --force: what is not written yet is lost",
            )

    def detach(self, host: Host, record: Record, disk: DataDisk) -> None:
        connection = host.connection(record.mode)
        disks.detach(connection, _domain(host, record), _path(host, disk), timeout_s=_DETACH_TIMEOUT_S)

    def get_root_size(self, host: Host, record: Record) -> int:
        try:
            return host.shell.call(diskfiles.read_qcow2_size, _root(host, record))
        except HostError:  # the store is root's
            return record.spec.disk_bytes

    def describe_root(self, host: Host, record: Record) -> DataDisk:
        path = _root(host, record)
        definition = ElementTree.fromstring(domains.get_xml(_domain(host, record)))
        element = disks.find_element(definition, str(path))
        tune = element.find("iotune") if element is not None else None
        limits = [int(tune.findtext(tag, "0")) if tune is not None else 0 for tag in (_IOPS, _BYTES)]
        return DataDisk(
            name="root",
            kind=DiskKind.ROOT,
            format=VolumeFormat.QCOW2,
            source=str(path),
            size_bytes=self.get_root_size(host, record),
            target="vda",
            serial="root",
            throttle=Throttle(iops=limits[0], bytes_per_s=limits[1]),
        )

    def check_growth(self, host: Host, record: Record, disk: DataDisk | None, size_bytes: int, is_off: bool) -> None:
        if disk is not None and disk.kind is not DiskKind.VOLUME:
            raise Unsupported(
                f"{disk.name!r} is not hvctl's to resize: {disk.source}", hint="resize it where it was made"
            )
        if size_bytes > _LARGEST_BYTES:
            raise InvalidSpec(
                f"a disk of {format_size(size_bytes)} is not possible", hint=f"{format_size(_LARGEST_BYTES)} or less"
            )

    def grow(self, host: Host, record: Record, disk: DataDisk | None, size_bytes: int) -> None:
        path = Path(_path(host, disk)) if disk else _root(host, record)
        domain = _domain(host, record)
        live = disks.find(domain, str(path)) if domains.is_active(domain) else None
        if live is not None:
            disks.resize(domain, _target(live), size_bytes)
            return
        format_ = disk.format.value if disk else VolumeFormat.QCOW2.value
        words: list[Argument] = ["qemu-img", "resize", "-q", "-f", format_, "--", path, str(size_bytes)]
        host.shell.run(words, timeout_s=_QEMU_IMG_TIMEOUT_S)

    def grow_inside(self, host: Host, record: Record, size_bytes: int) -> bool:
        if record.provision is not Provision.CREDENTIALS:  # an image of others': who knows what it has
            return False
        argv = ("sh", "-c", _GROW, "grow", str(size_bytes))
        done = agent.run(_domain(host, record), argv, ENVIRONMENT, b"", host.pause)
        if done.status != 0:
            said = done.stderr.decode(errors="replace").strip()[:200]
            raise GuestFailed(
                f"the disk of {record.name!r} has grown, but not the file system in it: {said}",
                hint=f"it grows at the next boot: hvctl restart {record.name}",
            )
        return True

    def throttle_in(self, host: Host, record: Record, domain: Element, disk: DataDisk | None, limits: Throttle) -> None:
        path = _path(host, disk) if disk else str(_root(host, record))
        element = disks.find_element(domain, path)
        if element is None:
            raise NotFound(f"{record.name!r} has no disk at {path}", hint=f"hvctl show {record.name} --xml")
        _set_throttle(element, limits)

    def throttle(self, host: Host, record: Record, disk: DataDisk | None, limits: Throttle) -> None:
        domain = _domain(host, record)
        live = disks.find(domain, _path(host, disk) if disk else str(_root(host, record)))
        if live is not None:
            disks.throttle(domain, _target(live), iops=limits.iops, bytes_per_s=limits.bytes_per_s)


def _new(request: DiskRequest) -> DataDisk:
    if not request.size_bytes:
        raise InvalidSpec(f"disk {request.name!r} has no size", hint="--size 10G, or take --volume, --device or --iso")
    format_ = request.format or VolumeFormat.RAW
    if request.filesystem and format_ is not VolumeFormat.RAW:
        raise Unsupported("only a raw disk can be given a file system", hint="--format raw, or make it inside")
    if request.size_bytes > _LARGEST_BYTES:
        raise InvalidSpec(f"a disk of {format_size(request.size_bytes)} is not possible", hint="16TiB or less")
    return DataDisk(
        name=request.name,
        kind=DiskKind.VOLUME,
        format=format_,
        size_bytes=request.size_bytes,
        filesystem=request.filesystem,
    )


def _adopt(volume: DataDisk, request: DiskRequest) -> DataDisk:
    if volume.format is VolumeFormat.DIRECTORY:
        raise Unsupported(
            f"volume {volume.name!r} is a directory, which a VM cannot have as a disk",
            hint="copy its files over ssh; a volume made with --size is a disk and can go to both modes",
        )
    return replace(volume, name=request.name)


def _foreign(request: DiskRequest, kind: DiskKind, size_bytes: int) -> DataDisk:
    source = request.iso or request.device
    return DataDisk(name=request.name, kind=kind, format=VolumeFormat.RAW, source=source, size_bytes=size_bytes)


def _check_iso(host: Host, record: Record, path: str) -> int:
    """Its size in bytes. Raises InvalidSpec, or HostError where QEMU's user may not read it."""
    fault = host.shell.call(diskfiles.find_fault_of_file, Path(path), host.store.root)
    if fault:
        raise InvalidSpec(f"{path!r} cannot be an ISO image for {record.name!r}: {fault}", hint="--iso /srv/NAME.iso")
    owner = survey.find_guest_owner(host.connection(record.mode))
    if owner is not None and owner[0] != 0 and not host.shell.call(diskfiles.may_read, Path(path), *owner):
        raise HostError(
            f"the user that QEMU runs as (uid {owner[0]}) cannot read {path!r}",
            hint=f"chmod o+r {shlex.quote(path)}; it must also be allowed to pass all directories above",
        )
    return host.shell.call(files.size, Path(path))


def _check_device(host: Host, record: Record, request: DiskRequest) -> int:
    """Its size in bytes. Raises InvalidSpec."""
    path = request.device
    fault = host.shell.call(diskfiles.find_fault_of_device, Path(path))
    if fault:
        raise InvalidSpec(
            f"{path!r} cannot be a disk of {record.name!r}: {fault}",
            hint="see what there is: lsblk; ls /dev/disk/by-id",
        )
    return host.shell.call(diskfiles.size_of_device, Path(path))


def _check_serial(record: Record, serial: str) -> str:
    if not _SERIAL.fullmatch(serial):
        raise InvalidSpec(
            f"{serial!r} cannot be a serial number", hint="1 to 20 letters, digits, dots, hyphens and underscores"
        )
    if serial in (*_RESERVED_SERIALS, *(disk.serial for disk in record.disks)):
        raise InvalidSpec(f"{record.name!r} has a disk with the serial number {serial!r}", hint="--serial OTHER")
    return serial


def _format(host: Host, disk: DataDisk) -> Element:
    """The disk as libvirt's element."""
    is_device = disk.kind is DiskKind.DEVICE
    element = Element("disk", {"type": "block" if is_device else "file", "device": "disk"})
    driver = SubElement(element, "driver", {"name": "qemu", "type": disk.format})
    if disk.cache is not Cache.DEFAULT:
        driver.set("cache", disk.cache)
    if not disk.is_read_only:
        driver.set("discard", "unmap" if disk.has_discard else "ignore")
        driver.set("error_policy", "stop")
        driver.set("rerror_policy", "stop")
    source = SubElement(element, "source", {"dev" if is_device else "file": _path(host, disk)})
    if disk.kind is DiskKind.ISO:  # the user's file stays the user's
        SubElement(source, "seclabel", {"model": "dac", "relabel": "no"})
    SubElement(element, "target", {"dev": disk.target, "bus": "virtio"})
    if disk.is_read_only:
        SubElement(element, "readonly")
    SubElement(element, "serial").text = disk.serial
    _set_throttle(element, disk.throttle)
    return element


def _set_throttle(element: Element, limits: Throttle) -> None:
    for old in element.findall("iotune"):
        element.remove(old)
    if limits != Throttle():
        tune = SubElement(element, "iotune")
        for tag, number in ((_BYTES, limits.bytes_per_s), (_IOPS, limits.iops)):
            if number:
                SubElement(tune, tag).text = str(number)


def _target(element: Element) -> str:
    target = element.find("target")
    return target.get("dev", "") if target is not None else ""


def _path(host: Host, disk: DataDisk) -> str:
    return disk.source or str(host.store.volume_content(disk.volume, disk.format))


def _root(host: Host, record: Record) -> Path:
    """The writable layer of the root."""
    return host.store.layer_disk(record.layers[-1])


def _domain(host: Host, record: Record) -> Any:
    return domains.get(host.connection(record.mode), record.uuid)
