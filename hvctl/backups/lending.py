"""What a backup reads of an instance, and how long that holds still: a snapshot of its root, and its data volumes.

Volumes have no snapshots. Those of a running instance are copied (blocks are shared where the file system can) while it is
held still; those of one that is off are read where they are, and it cannot be started meanwhile.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

from hvctl import metadata, operation
from hvctl.backends import get_backend
from hvctl.errors import NotFound
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files, transfer
from hvctl.hostside.transfer import Source
from hvctl.instances import claim, layers, query, snapeffects, snapshots
from hvctl.instances.recovery import get_settled
from hvctl.instances.snapshots import Take
from hvctl.instances.verbs import LEND
from hvctl.model import DataDisk, DiskKind, Instance, Purpose, Record, Snapshot, State, VolumeFormat
from hvctl.values import dataclass

_LOCK_TIMEOUT_S = 120
_COPY_TIMEOUT_S = 86400
_CP = ("cp", "--archive", "--reflink=auto", "--sparse=always", "--")


@dataclass(frozen=True, kw_only=True)
class Lent:
    """An instance as it was at one moment."""

    record: Record
    """Of that moment; its layers are those of the snapshot, all sealed."""
    snapshot: Snapshot
    moment: datetime.datetime
    definition: str
    volumes: tuple[tuple[DataDisk, Source], ...]
    held: contextlib.ExitStack
    """Whoever has read the volumes closes it: they may be written again."""


@contextlib.contextmanager
def lend(host: Host, name: str, directory: Path, *, with_volumes: bool, events: Sink = ignore) -> Iterator[Lent]:
    """For the block, what a backup of the instance reads; copies go to `directory`, which is the caller's to remove.

    Raises what `snapshots.take` raises, and HostError without space for copies.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(host.lock(name, timeout_s=_LOCK_TIMEOUT_S))
        uuid = get_settled(host, name).record.uuid
        _release(host, uuid)  # what an interrupted one left is of another moment
        moment = datetime.datetime.now(datetime.UTC)
        volumes = _lend_volumes(host, query.get(host, name), directory, events) if with_volumes else ()
        taken = snapshots.take_locked(host, name, Take(purpose=Purpose.BACKUP), events)
        try:
            instance = query.get(host, name)
            if not volumes or _is_on(instance):
                held.close()
            definition = host.read_text(host.store.snapshot(uuid, taken.id) / "domain.xml")
            record = _record_of(host, instance.record, taken, definition)
            yield Lent(record=record, snapshot=taken, moment=moment, definition=definition, volumes=volumes, held=held)
        finally:
            held.close()
            if not host.cancelled.is_set():  # else `gc` does it
                _let_go(host, uuid)


def _let_go(host: Host, uuid: UUID) -> None:
    """Forget the snapshot, whatever the instance is called by now, if it is there."""
    instance = next((item for item in host.instances() if item.record.uuid == uuid), None)
    if instance is not None:
        with host.lock(instance.name, timeout_s=_LOCK_TIMEOUT_S):
            _release(host, uuid)


def _release(host: Host, uuid: UUID) -> None:
    for instance in host.instances():
        if instance.record.uuid == uuid and instance.record.pending is None:
            record = instance.record
            for snapshot in [item for item in record.snapshots if item.purpose is Purpose.BACKUP]:
                snapshots.delete_locked(host, record, snapshot, ignore)
                record = query.get(host, record.name).record


def _record_of(host: Host, now: Record, snapshot: Snapshot, definition: str) -> Record:
    record, known = metadata.find(definition), snapeffects.find_by_id(now, snapshot.id)
    if record is None or known is None:
        raise NotFound(f"the snapshot {snapshot.name!r} has lost its definition", hint="try again")
    return replace(record, layers=layers.stack_of(host, snapshot.layer), snapshots=(*record.snapshots, known))


def _lend_volumes(host: Host, instance: Instance, directory: Path, events: Sink) -> tuple[tuple[DataDisk, Source], ...]:
    record = instance.record
    found = [disk for disk in record.disks if disk.kind is DiskKind.VOLUME]
    if not found:
        return ()
    contents = {disk.name: host.store.volume_content(disk.volume, disk.format) for disk in found}
    contents = _copy(host, instance, contents, directory, events)
    return tuple((disk, _source_of(disk, contents[disk.name])) for disk in found)


def _source_of(disk: DataDisk, content: Path) -> Source:
    if disk.format is VolumeFormat.DIRECTORY:
        return Source(kind=transfer.TREE, path=str(content), name="data")
    return Source(kind=transfer.FILE, path=str(content))


def _copy(host: Host, instance: Instance, contents: dict[str, Path], directory: Path, events: Sink) -> dict[str, Path]:
    """Copies of the volumes of one that runs, made while it is held still; gc lets it go on where we are killed.

    Of one that is off, the volumes themselves.
    """
    record, backend, is_on = instance.record, get_backend(instance.record.mode), _is_on(instance)
    if is_on:
        needed_bytes = sum(host.shell.call(files.disk_usage, path) for path in contents.values())
        layers.check_space(host, needed_bytes, what=f"copies of the volumes of {record.name!r}")
    is_held = instance.state is State.RUNNING
    pending = operation.intend(LEND, is_held="yes" if is_held else "no")
    copies = {name: directory / f"volume-{name}" for name in contents}
    with operation.begin(host, LEND, replace(record, pending=pending), claim.claim_existing(host), events) as change:
        with change.step("hold"):
            note = backend.hold(host, record) if is_held else ""
        with change.step("copy"):
            if is_on:
                host.shell.run(["sync"], timeout_s=_COPY_TIMEOUT_S)  # what this host's kernel has not written yet
                for name, path in contents.items():
                    host.shell.run([*_CP, str(path), str(copies[name])], timeout_s=_COPY_TIMEOUT_S)
        change.redo_after("copy")
    if note:
        events(Note(record.name, note))
    return copies if is_on else contents


def _is_on(instance: Instance) -> bool:
    return instance.live.state in (State.RUNNING, State.PAUSED)
