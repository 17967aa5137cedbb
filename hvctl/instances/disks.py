"""Data disks and the size of the root: add, remove, move, resize, limit.

A running VM gets and loses a disk at once; what a mode cannot do while it runs, it says.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from uuid import uuid4
from xml.etree import ElementTree

from hvctl import identity, metadata, operation
from hvctl.backends import Backend, DiskRequest, get_backend
from hvctl.errors import AlreadyExists, HvctlError, InvalidSpec, NotFound, UsageError, WrongState
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.hostside import diskfiles
from hvctl.instances import diskeffects, effects, query, volumes
from hvctl.instances.claim import claim_existing
from hvctl.instances.diskeffects import ROOT
from hvctl.instances.recovery import get_settled
from hvctl.instances.verbs import DISK_ADD, DISK_REMOVE, DISK_RESIZE, DISK_SET
from hvctl.libvirtapi import domains
from hvctl.model import Cache, DataDisk, DiskKind, Instance, Record, State, Throttle, VolumeFormat
from hvctl.operation import Verb
from hvctl.units import MIB, format_size
from hvctl.values import dataclass

__all__ = [
    "ROOT",
    "Added",
    "DiskRequest",
    "Grown",
    "add",
    "delete_volume",
    "list_disks",
    "move",
    "remove",
    "resize",
    "throttle",
]

_LEAST_BYTES = 1 * MIB
_LEAST_EXT4_BYTES = 16 * MIB


@dataclass(frozen=True, kw_only=True)
class Added:
    """A disk that an instance has now; `is_live`: or, not so, from its next start on."""

    disk: DataDisk
    is_live: bool


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A disk that has another size now: whether it was not so before, and whether the file system in it is as large."""

    disk: DataDisk | None
    """As it is now; None: the root."""
    size_bytes: int
    has_changed: bool
    is_grown_inside: bool


def add(host: Host, name: str, request: DiskRequest, *, volume: str = "", events: Sink = ignore) -> Added:
    """Give an instance a disk: a new volume, one that nobody has (`volume`: its name or identifier), a device, an ISO.

    Raises AlreadyExists for a taken name, NotFound for an unknown volume, Unsupported for what the mode cannot, InvalidSpec
    and HostError for a device or file that may not be used.
    """
    host.require_root("disk add")
    _check_request(request, volume)
    with host.lock(name):
        before = query.get(host, name)
        instance = get_settled(host, name)
        done = _find_finished(before.record, instance.record, DISK_ADD, request.name)
        if done is not None:
            return Added(disk=done, is_live=_is_running(instance))
        _check_can_change(instance)
        with contextlib.ExitStack() as stack:
            if volume:
                existing = volumes.get_unattached(host, volume)
                stack.enter_context(host.lock(f"volume-{existing.id}"))
                if existing.id in volumes.list_owned(host):
                    raise WrongState(f"volume {volume!r} was given to another instance", hint="hvctl disk list")
                request = replace(request, existing=existing.disk)
            return _add_locked(host, instance, request, events)


def remove(
    host: Host, name: str, disk_name: str, *, keep: bool = False, force: bool = False, events: Sink = ignore
) -> DataDisk:
    """Take a disk away; a volume is deleted with all that is in it unless it is to be kept. Devices and ISO files stay.

    `force`: also one that the guest says it has mounted. Raises NotFound, WrongState while it is used, TimedOut or
    GuestFailed when a guest does not let go.
    """
    host.require_root("disk remove")
    with host.lock(name):
        before = query.get(host, name)
        instance = get_settled(host, name)
        was = _find_pending(before.record, DISK_REMOVE, disk_name)
        if was is not None and disk_name not in {disk.name for disk in instance.record.disks}:
            return was
        record = instance.record
        disk = diskeffects.find_disk(record, disk_name)
        if disk is None:
            raise UsageError(f"{name!r} cannot be without its root", hint=f"hvctl delete {name}")
        _check_can_change(instance)
        get_backend(record.mode).disks.check_unused(host, record, disk, force=force)
        domain = _definition(host, record)
        get_backend(record.mode).disks.remove_from(host, record, domain, disk)
        after = replace(record, disks=tuple(other for other in record.disks if other.name != disk_name))
        pending = operation.intend(DISK_REMOVE, keep="yes" if keep else "no", **metadata.format_disk(disk))
        with operation.begin(
            host, DISK_REMOVE, replace(record, pending=pending), claim_existing(host), events
        ) as change:
            with change.step("detach"):
                diskeffects.detach(host, change.record)
            change.commit("define", _text(domain), replace(change.record, disks=after.disks))
            change.redo_after("define")
        return disk


def move(host: Host, name: str, disk_name: str, to: str, request: DiskRequest, events: Sink = ignore) -> Added:
    """Take a volume from one instance and give it to another; between the two it is kept as a volume of nobody's.

    The same call goes on where one was interrupted, so `name` may also have been the last to have it. Raises what `remove`
    and `add` raise; what the other one cannot take is found before anything is changed.
    """
    host.require_root("disk move")
    if name == to:
        diskeffects.find_disk(query.get(host, name).record, disk_name)
        raise UsageError(f"{disk_name!r} is a disk of {name!r} already", hint=f"hvctl disk list {name}")
    _check_request(request, disk_name)
    with host.lock(name):
        get_settled(host, name)
    with host.lock(to):
        before, target = query.get(host, to), get_settled(host, to)
    done = _find_finished(before.record, target.record, DISK_ADD, request.name)
    if done is not None:
        return Added(disk=done, is_live=True)
    _check_can_change(target)
    _check_free(target.record, request.name)
    disk = _find_to_move(host, name, disk_name)
    _plan(host, target.record, replace(request, existing=disk))
    with contextlib.suppress(NotFound):  # an interrupted call had come so far
        remove(host, name, disk_name, keep=True, events=events)
    try:
        return add(host, to, request, volume=disk.volume, events=events)
    except HvctlError as error:
        error.hint = f"{error.hint}; the volume is kept: hvctl disk add NAME {disk_name} --volume {disk.volume}"
        raise


def get_root_size(host: Host, record: Record) -> int:
    """Bytes of the root of an instance; 0 where it has no size of its own, or this user may not look."""
    return get_backend(record.mode).disks.get_root_size(host, record)


def list_disks(host: Host, instance: Instance) -> tuple[DataDisk, ...]:
    """The root of an instance, and its data disks."""
    record = instance.record
    return (get_backend(record.mode).disks.describe_root(host, record), *record.disks)


def resize(host: Host, name: str, disk_name: str, size_bytes: int, events: Sink = ignore) -> Grown:
    """Make a disk (`root`: the root) larger, and where the guest is one of ours the file system in it.

    The root of a container has a limit, which may also be lower than before, or 0: none. Raises InvalidSpec for a smaller
    size, or one that what is there does not fit into, Unsupported for what has no size or is not ours, GuestFailed when
    only the disk could grow.
    """
    host.require_root("disk resize")
    size_bytes = _round_up(size_bytes)
    with host.lock(name):
        instance = get_settled(host, name)
        record = instance.record
        work = get_backend(record.mode).disks
        disk = diskeffects.find_disk(record, disk_name)
        _check_can_change(instance)
        may_shrink = disk is None and work.shrinks_roots
        if not size_bytes and not may_shrink:
            raise InvalidSpec(
                f"{disk_name!r} of {name!r} cannot be without a size", hint="the root of a container can: give a size"
            )
        now_bytes = work.get_root_size(host, record) if disk is None else disk.size_bytes
        is_ours = disk is None or disk.kind is DiskKind.VOLUME
        if size_bytes < now_bytes and is_ours and not may_shrink:
            raise InvalidSpec(
                f"{disk_name!r} of {name!r} has {format_size(now_bytes)}, and a disk cannot shrink: what lies beyond "
                "the end would be lost",
                hint="make a new, smaller one and copy: hvctl disk add",
            )
        work.check_growth(host, record, disk, size_bytes, not _is_running(instance))
        if disk is not None:
            volumes.check_size(host, size_bytes)
        if size_bytes != now_bytes:
            _resize_locked(host, record, disk, size_bytes, events)
        is_grown_inside = disk is None and _is_running(instance) and work.grow_inside(host, record, size_bytes)
        return Grown(
            disk=disk,
            size_bytes=size_bytes,
            has_changed=size_bytes != now_bytes,
            is_grown_inside=is_grown_inside or work.grows_file_systems,
        )


def throttle(host: Host, name: str, disk_name: str, limits: Throttle, events: Sink = ignore) -> None:
    """Limit what a disk (`root`: the root) may do in a second, from now on. Raises Unsupported, NotFound."""
    host.require_root("disk set")
    with host.lock(name):
        instance = get_settled(host, name)
        record = instance.record
        backend = get_backend(record.mode)
        backend.check_throttle()
        disk = diskeffects.find_disk(record, disk_name)
        domain = _definition(host, record)
        backend.disks.throttle_in(host, record, domain, disk, limits)
        disks = tuple(replace(other, throttle=limits) if other is disk else other for other in record.disks)
        pending = operation.intend(DISK_SET, name=disk_name, iops=str(limits.iops), bytes=str(limits.bytes_per_s))
        with operation.begin(host, DISK_SET, replace(record, pending=pending), claim_existing(host), events) as change:
            change.commit("define", _text(domain), replace(change.record, disks=disks))
            change.redo_after("define")


def delete_volume(host: Host, text: str) -> volumes.Volume:
    """Delete a volume that nobody has, by its name or identifier. Raises NotFound, WrongState."""
    host.require_root("disk delete")
    volume = volumes.get_unattached(host, text)
    with host.lock(f"volume-{volume.id}"):
        if volume.id in volumes.list_owned(host):
            raise WrongState(f"volume {text!r} was given to an instance", hint="hvctl disk list")
        volumes.discard(host, volume.id)
    return volume


def _add_locked(host: Host, instance: Instance, request: DiskRequest, events: Sink) -> Added:
    record = instance.record
    _check_free(record, request.name)
    work = get_backend(record.mode).disks
    disk = _plan(host, record, request)
    is_new = disk.kind is DiskKind.VOLUME and request.existing is None
    if is_new:
        volumes.check_size(host, disk.size_bytes)
    disk = replace(disk, volume=str(uuid4())) if is_new else disk
    domain = _definition(host, record)
    work.add_to(host, record, domain, disk)
    pending = operation.intend(DISK_ADD, made="yes" if is_new else "no", **metadata.format_disk(disk))
    is_live = True
    with operation.begin(host, DISK_ADD, replace(record, pending=pending), claim_existing(host), events) as change:
        with change.step("volume"):
            if is_new:
                volumes.make(host, disk, record.name)
        with change.step("attach"):
            if _is_running(instance):
                is_live = work.attach(host, change.record, disk)
        change.commit("define", _text(domain), replace(change.record, disks=(*record.disks, disk)))
        change.redo_after("define")
    return Added(disk=disk, is_live=is_live)


def _resize_locked(host: Host, record: Record, disk: DataDisk | None, size_bytes: int, events: Sink) -> None:
    if disk is None:
        after = replace(record, spec=replace(record.spec, disk_bytes=size_bytes))
    else:
        grown = replace(disk, size_bytes=size_bytes)
        after = replace(record, disks=tuple(grown if other is disk else other for other in record.disks))
    pending = operation.intend(DISK_RESIZE, name=disk.name if disk else ROOT, size=str(size_bytes))
    with operation.begin(host, DISK_RESIZE, replace(record, pending=pending), claim_existing(host), events) as change:
        committed = replace(change.record, spec=after.spec, disks=after.disks)
        change.commit("define", _text(_definition(host, record)), committed)
        change.redo_after("define")


def _check_request(request: DiskRequest, volume: str) -> None:
    """What is wrong in any mode."""
    identity.check_name(request.name)
    if request.name == ROOT:
        raise InvalidSpec("'root' is the root disk", hint="choose another name")
    given = [option for option in (volume, request.device, request.iso) if option]
    if len(given) > 1:
        raise UsageError(
            "a disk is a volume, a device or an ISO image", hint="give one of --volume, --device and --iso"
        )
    is_new = not given
    if not is_new and (request.size_bytes or request.format or request.filesystem):
        raise UsageError("only a new disk can be given a size or a format", hint="grow it: hvctl disk resize")
    if request.size_bytes and request.size_bytes < (_LEAST_EXT4_BYTES if request.filesystem else _LEAST_BYTES):
        raise InvalidSpec(f"{format_size(request.size_bytes)} is too small for a disk", hint="--size 1G")


def _plan(host: Host, record: Record, request: DiskRequest) -> DataDisk:
    """The disk as this instance would have it, after everything that its mode must be able to."""
    backend: Backend = get_backend(record.mode)
    is_block = request.device or request.iso or request.serial or request.cache is not Cache.DEFAULT
    if is_block or request.format is VolumeFormat.QCOW2:
        backend.check_block_disks()
    if request.device and not request.is_read_only:
        _check_nobodys(host, request.device)
    if request.throttle != Throttle():
        backend.check_throttle()
    if request.target or request.format is VolumeFormat.DIRECTORY:
        backend.check_directory_volumes()
    return backend.disks.plan(host, record, replace(request, size_bytes=_round_up(request.size_bytes)))


def _check_nobodys(host: Host, device: str) -> None:
    """Two that write to one device destroy what is on it."""
    real = host.shell.call(diskfiles.resolve, device)
    for instance in host.instances():
        if real in {host.shell.call(diskfiles.resolve, disk.source) for disk in instance.record.disks if disk.source}:
            raise WrongState(f"{device!r} is a disk of {instance.name!r}", hint="--read-only, in both")


def _round_up(size_bytes: int) -> int:
    """To whole MiB: what every format and file system can be."""
    return -(-size_bytes // MIB) * MIB


def _check_free(record: Record, disk_name: str) -> None:
    if disk_name in {disk.name for disk in record.disks}:
        raise AlreadyExists(f"{record.name!r} has a disk {disk_name!r}", hint="choose another name")


def _check_can_change(instance: Instance) -> None:
    if instance.state not in (State.RUNNING, State.STOPPED, State.CRASHED):
        raise WrongState(f"{instance.name!r} is {instance.state}", hint=f"hvctl resume {instance.name}")


def _is_running(instance: Instance) -> bool:
    return instance.live.state is State.RUNNING


def _find_to_move(host: Host, name: str, disk_name: str) -> DataDisk:
    """The volume that an instance has under this name, or had until an interrupted call took it away."""
    record = query.get_complete(host, name).record
    for disk in record.disks:
        if disk.name == disk_name:
            if disk.kind is not DiskKind.VOLUME:
                raise UsageError(f"{disk_name!r} is no volume but {disk.source}", hint="remove it here, add it there")
            return disk
    for volume in volumes.list_unattached(host):
        if (volume.disk.name, volume.last_owner) == (disk_name, name):
            return volume.disk
    raise NotFound(f"{name!r} has no disk {disk_name[:80]!r}", hint=f"see which it has: hvctl disk list {name}")


def _find_pending(record: Record, verb: Verb, disk_name: str) -> DataDisk | None:
    """The disk of an unfinished change of this verb, when it is about the disk of this name."""
    if record.pending is None or record.pending.verb != verb.name:
        return None
    disk = diskeffects.disk_of(record)
    return disk if disk.name == disk_name else None


def _find_finished(before: Record, now: Record, verb: Verb, disk_name: str) -> DataDisk | None:
    """The disk that an interrupted call has added, now that it is finished."""
    pending = _find_pending(before, verb, disk_name)
    return next((disk for disk in now.disks if pending is not None and disk == pending), None)


def _definition(host: Host, record: Record) -> ElementTree.Element:
    return ElementTree.fromstring(domains.get_xml(effects.get_domain(host, record)))


def _text(domain: ElementTree.Element) -> str:
    return ElementTree.tostring(domain, encoding="unicode")
