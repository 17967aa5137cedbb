"""Making a backup: a snapshot for its time, what of its layers the repository lacks, the manifest last.

The instance is held still only while the snapshot is taken. Its layers are never written again, so they are read while it
goes on, starts and stops; while the snapshot is there they are neither removed nor merged.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from hvctl import metadata
from hvctl.backends import get_backend
from hvctl.backups import manifest
from hvctl.backups.manifest import Backup, Part, Subject
from hvctl.backups.repository import Repository
from hvctl.errors import HostError, HvctlError, InvalidSpec, NotFound, Unsupported
from hvctl.events import Note, Sink, StepStarted, ignore
from hvctl.host import Host
from hvctl.hostside import files, transfer
from hvctl.hostside import layers as layer_files
from hvctl.hostside.transfer import Source
from hvctl.instances import claim, layers, query, snapeffects, snapshots
from hvctl.instances.recovery import get_settled
from hvctl.instances.snapshots import Take
from hvctl.model import Artefact, DiskKind, Image, Purpose, Record, Snapshot
from hvctl.rootfs import building
from hvctl.units import MIB, format_size

VERB = "backup"
_STATE = "state"
_COMMENT_LIMIT = 200
_LOCK_TIMEOUT_S = 120
_RESERVE_BYTES = 16 * MIB


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `backup create` is asked for."""

    name: str
    comment: str = ""
    is_full: bool = False
    """Read and store everything again, whatever earlier backups say of it; what is damaged there is mended by it."""
    with_image: bool = True


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Something to store: what is known of it, how it is read, about how large it is."""

    part: Part
    source: Source


def create(host: Host, repository: Repository, wanted: Wanted, events: Sink = ignore) -> Backup:
    """Back an instance up, running or not.

    Raises NotFound, WrongState, Unsupported for an application, HostError without space, before anything is stored; a
    failure later leaves neither a backup nor content, and the instance as it was.
    """
    host.require_root("backup create")
    if len(wanted.comment) > _COMMENT_LIMIT or not wanted.comment.isprintable():
        raise InvalidSpec(f"a comment is one line of at most {_COMMENT_LIMIT} characters")
    repository.check()
    record = query.get(host, wanted.name).record
    _check(record)
    with (
        host.lock(claim.backup_lock(record.uuid)),
        building.begin(host, wanted.name, events) as work,
        repository.writing(),
    ):
        tell(host, events, wanted.name, "collect")
        earlier = [entry.backup for entry in repository.list_entries() if entry.backup is not None]
        collect(repository)
        with _held(host, wanted.name, events) as (record, snapshot):
            pieces = _plan(host, work.directory, record, snapshot, wanted)
            known = {} if wanted.is_full else _find_known(repository, earlier)
            try:
                return _store(repository, pieces, known, _Frame(record, snapshot, wanted, work.directory, events))
            except BaseException:
                with contextlib.suppress(HvctlError):
                    collect(repository)
                raise


def collect(repository: Repository) -> int:
    """Remove content that no backup uses, unless some manifest cannot be read and so might; how many things went."""
    entries = repository.list_entries()
    if any(entry.backup is None for entry in entries):
        return 0
    return repository.collect(part for entry in entries if entry.backup for part in entry.backup.parts)


def tell(host: Host, events: Sink, name: str, step: str) -> None:
    """Report a step; raises Interrupted when somebody cancels."""
    host.pause(0)
    events(StepStarted(name, VERB, step))


@dataclass(frozen=True)
class _Frame:
    """What a backup is made of, and where."""

    record: Record
    snapshot: Snapshot
    wanted: Wanted
    directory: Path
    events: Sink


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """Everything that a backup consists of, by its place in the manifest."""

    image: Image
    base: Image
    base_parts: tuple[_Piece, ...]
    layers: tuple[_Piece, ...]
    state: _Piece
    definition: str


def _check(record: Record) -> None:
    if record.is_application:
        raise Unsupported(
            f"{record.name!r} runs an application: its words and environment may be secret and are in no record",
            hint="back up its volumes' data, and make it anew: hvctl create",
        )


@contextlib.contextmanager
def _held(host: Host, name: str, events: Sink) -> Iterator[tuple[Record, Snapshot]]:
    """The instance as it was at one moment, and the snapshot of that, kept for the block."""
    with host.lock(name, timeout_s=_LOCK_TIMEOUT_S):
        release(host, get_settled(host, name).record.uuid)  # what an interrupted one left is of another moment
        taken = snapshots.take_locked(host, name, Take(purpose=Purpose.BACKUP), events)
        uuid = query.get(host, name).record.uuid
    try:
        yield _record_of(host, uuid, taken), taken
    finally:
        if not host.cancelled.is_set():  # else `gc` does it
            instance = next((item for item in host.instances() if item.record.uuid == uuid), None)
            if instance is not None:
                with host.lock(instance.name, timeout_s=_LOCK_TIMEOUT_S):
                    release(host, uuid)


def release(host: Host, uuid: UUID) -> None:
    """Forget the snapshots that were taken for backups; the caller holds the instance's lock, and no backup goes on."""
    for instance in host.instances():
        if instance.record.uuid == uuid and instance.record.pending is None:
            record = instance.record
            for snapshot in [item for item in record.snapshots if item.purpose is Purpose.BACKUP]:
                snapshots.delete_locked(host, record, snapshot, ignore)
                record = query.get(host, record.name).record


def _record_of(host: Host, uuid: UUID, snapshot: Snapshot) -> Record:
    """The record of the moment of a snapshot; its layers are those that the snapshot ends with."""
    record = metadata.find(_definition_of(host, uuid, snapshot))
    if record is None:
        raise NotFound(f"the snapshot {snapshot.name!r} has lost its definition", hint="try again")
    known = snapeffects.find_by_id(
        next(item.record for item in host.instances() if item.record.uuid == uuid), snapshot.id
    )
    consistency = known.consistency if known else snapshot.consistency
    kept = replace(snapshot, consistency=consistency)
    return replace(record, layers=layers.stack_of(host, snapshot.layer), snapshots=(*record.snapshots, kept))


def _definition_of(host: Host, uuid: UUID, snapshot: Snapshot) -> str:
    return host.read_text(host.store.snapshot(uuid, snapshot.id) / "domain.xml")


def _plan(host: Host, directory: Path, record: Record, snapshot: Snapshot, wanted: Wanted) -> _Pieces:
    """Everything that it consists of, and how that is read. The state is copied: it is small, and in use."""
    mode_layers, image = get_backend(record.mode).layers, layers.image_of(host, record)
    base, sources = mode_layers.list_base(host, image)
    digests = {part.file: part for part in (base.kernel, base.initrd, base.disk and base.disk.artefact) if part}
    known_by = image.id if mode_layers.is_known_by(host, image) else ""
    base_parts = [
        _piece(host, name, _base_key(image, known_by, digests.get(name)), source) for name, source in sources.items()
    ]
    pieces = []
    for number, layer in enumerate(record.layers):
        parent = host.shell.call(layer_files.read_facts, host.store.layer(layer)).parent
        pieces.append(_piece(host, f"layer{number}", f"layer:{layer}:{parent}", mode_layers.read_layer(host, layer)))
    return _Pieces(
        image=replace(image, id=known_by),
        base=replace(base, name="", source="", origin=""),
        base_parts=tuple(base_parts) if wanted.with_image else (),
        layers=tuple(pieces),
        state=_piece(host, "state", "state", _gather_state(host, directory / _STATE, record, snapshot)),
        definition=_definition_of(host, record.uuid, snapshot),
    )


def _base_key(image: Image, known_by: str, artefact: Artefact | None) -> str:
    """A file has a digest; a tree is the image's own, or one that was made here."""
    return f"file:{artefact.sha256}" if artefact else f"tree:{image.id}:{'own' if known_by else socket.gethostname()}"


def _piece(host: Host, name: str, key: str, source: Source) -> _Piece:
    measure = files.disk_usage if source.kind == transfer.TREE else files.size
    size_bytes = host.shell.call(measure, Path(source.path))
    return _Piece(part=Part(name=name, key=key, sha256="", size_bytes=size_bytes), source=source)


def _gather_state(host: Host, folder: Path, record: Record, snapshot: Snapshot) -> Source:
    store, call = host.store, host.shell.call
    call(files.make_directory, folder, 0o700)
    kept = store.snapshot(record.uuid, snapshot.id)
    paths = [kept / name for name in call(files.list_names, kept) if name != "domain.xml"]
    for path in (*paths, store.identity(record.uuid) / "hvctl.host_key", store.seed(record.uuid)):
        if call(files.exists, path):
            call(files.clone_file, path, folder / path.name, 0o600)
    return Source(kind=transfer.TREE, path=str(folder), name=folder.name)


def _find_known(repository: Repository, earlier: Sequence[Backup]) -> dict[str, Part]:
    """What earlier backups have stored, by what it is; the latest of each."""
    found = {part.key: part for backup in earlier for part in backup.parts if part.key != "state"}
    return {key: part for key, part in found.items() if repository.has(part)}


def _store(repository: Repository, pieces: _Pieces, known: dict[str, Part], frame: _Frame) -> Backup:
    host, record = repository.host, frame.record
    everything = [*pieces.base_parts, *pieces.layers, pieces.state]
    lacking = [piece for piece in everything if piece.part.key not in known]
    _check_space(repository, sum(piece.part.size_bytes for piece in lacking), record.name)
    left_out = 0

    def keep(piece: _Piece) -> Part:
        nonlocal left_out
        found = known.get(piece.part.key)
        if found is not None:
            return replace(found, name=piece.part.name)
        tell(host, frame.events, record.name, "content")
        part, count = repository.store(piece.source, piece.part, frame.directory / "scratch", frame.events, record.name)
        left_out += count
        stored.append(part)
        return part

    stored: list[Part] = []
    base_parts = tuple(keep(piece) for piece in pieces.base_parts)
    kept_layers = tuple(keep(piece) for piece in pieces.layers)
    state = keep(pieces.state)
    now = datetime.datetime.now(datetime.UTC)
    backup = Backup(
        id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        created_at=manifest.format_time(now),
        host=socket.gethostname(),
        consistency=record.snapshots[-1].consistency,
        subject=_subject_of(record),
        image_id=pieces.image.id,
        base=pieces.base,
        base_parts=base_parts,
        layers=kept_layers,
        state=state,
        left_out=(*_list_left_out(record), *([f"{left_out} device nodes"] if left_out else [])),
        comment=frame.wanted.comment,
        definition=pieces.definition,
        stored_bytes=sum(part.size_bytes for part in stored),
    )
    for line in backup.left_out:
        frame.events(Note(record.name, f"not in the backup: {line}"))
    content = manifest.format_backup(backup)
    manifest.parse_backup(content, "what was just made")  # nothing that could not be restored
    tell(host, frame.events, record.name, "manifest")
    repository.write_manifest(backup, content)
    tell(host, frame.events, record.name, "release")
    return backup


def _check_space(repository: Repository, needed_bytes: int, name: str) -> None:
    free_bytes = repository.find_free_bytes()
    if free_bytes is not None and free_bytes < needed_bytes + _RESERVE_BYTES:
        raise HostError(
            f"not enough space for a backup of {name!r} in {repository.text!r}: "
            f"{format_size(needed_bytes)} needed, {format_size(free_bytes)} free",
            hint="delete old ones: hvctl backup delete NAME --keep daily=7",
        )


def _subject_of(record: Record) -> Subject:
    return Subject(
        uuid=record.uuid,
        spec=replace(record.spec, mounts=()),
        mac=record.mac,
        address=record.address,
        login_user=record.login_user,
        provision=record.provision,
        kernel_release=record.kernel_release,
        authorized_keys=record.authorized_keys,
        created_at=record.created_at,
        labels=record.labels,
        keep=record.keep,
    )


def _list_left_out(record: Record) -> list[str]:
    found = [
        f"shared directory --mount {mount.source}:{mount.target}{':ro' if mount.is_read_only else ''}"
        for mount in record.spec.mounts
    ]
    for disk in record.disks:
        what = "volume" if disk.kind is DiskKind.VOLUME else f"{disk.kind} {disk.source}, disk"
        found.append(f"{what} {disk.name}")
    named = [item.name for item in record.snapshots if not item.purpose.is_passing]
    return [*found, *([f"its {len(named)} snapshots"] if named else [])]
