"""Making a backup: a snapshot for its time, what of its layers the repository lacks, the manifest last.

The instance is held still only while the snapshot is taken. Its layers are never written again, so they are read while it
goes on, starts and stops; while the snapshot is there they are neither removed nor merged.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvctl import metadata, templates
from hvctl.backends import get_backend
from hvctl.backups import manifest
from hvctl.backups.lending import Lent, lend
from hvctl.backups.manifest import Backup, Part, Subject
from hvctl.backups.repository import Entry, Repository
from hvctl.errors import HostError, HvctlError, InvalidSpec
from hvctl.events import Note, Sink, StepStarted, ignore
from hvctl.host import Host
from hvctl.hostside import files, transfer
from hvctl.hostside import layers as layer_files
from hvctl.hostside.transfer import Source
from hvctl.instances import claim, compact, layers, query
from hvctl.model import Artefact, DataDisk, DiskKind, Image, Record, Snapshot
from hvctl.rootfs import building
from hvctl.units import MIB, format_size, format_time
from hvctl.values import dataclass

VERB = "backup"
_STATE = "state"
_COMMENT_LIMIT = 200
_RESERVE_BYTES = 16 * MIB


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `backup create` is asked for."""

    name: str
    comment: str = ""
    is_full: bool = False
    """Read and store everything again, whatever earlier backups say of it; what is damaged there is mended by it."""
    with_image: bool = True
    with_volumes: bool = True


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
    query.check_is_system(record, hint="back up its volumes' data, and make it anew: hvctl create")
    with host.lock(claim.backup_lock(record.uuid)):
        backup = _create(repository, wanted, events)
    with contextlib.suppress(HvctlError):  # the backup is there; the stack that it has made deeper can wait
        compact.compact(host, wanted.name, events=events)
    return backup


def _create(repository: Repository, wanted: Wanted, events: Sink) -> Backup:
    host = repository.host
    with building.begin(host, wanted.name, events) as work, repository.writing():
        tell(host, events, wanted.name, "collect")
        entries = repository.list_entries()
        collect(repository, entries)
        earlier = [entry.backup for entry in entries if entry.backup is not None]
        with lend(host, wanted.name, work.directory, with_volumes=wanted.with_volumes, events=events) as lent:
            pieces = _plan(host, work.directory, lent, wanted)
            known = {} if wanted.is_full else _find_known(repository, earlier)
            try:
                return _store(repository, pieces, known, _Frame(lent, wanted, work.directory, events, earlier))
            except BaseException:
                with contextlib.suppress(HvctlError):
                    collect(repository, repository.list_entries())
                raise


def collect(repository: Repository, entries: Sequence[Entry]) -> int:
    """Remove content that none of a repository's backups uses, unless a manifest cannot be read and so might; how many
    things went."""
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

    lent: Lent
    wanted: Wanted
    directory: Path
    events: Sink
    earlier: Sequence[Backup]


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """Everything that a backup consists of, by its place in the manifest."""

    image: Image
    base: Image
    base_parts: tuple[_Piece, ...]
    layers: tuple[_Piece, ...]
    state: _Piece
    volumes: tuple[tuple[DataDisk, _Piece], ...]


def _plan(host: Host, directory: Path, lent: Lent, wanted: Wanted) -> _Pieces:
    """Everything that it consists of, and how that is read. The state is copied: it is small, and in use."""
    record = lent.record
    mode_layers, image = get_backend(record.mode).layers, layers.image_of(host, record)
    base, sources = mode_layers.list_base(host, image)
    digests = {part.file: part for part in base.artefacts}
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
        state=_piece(host, "state", "state", _gather_state(host, directory / _STATE, record, lent.snapshot)),
        volumes=tuple((disk, _piece(host, f"volume-{disk.name}", "volume", source)) for disk, source in lent.volumes),
    )


def _base_key(image: Image, known_by: str, artefact: Artefact | None) -> str:
    """A file has a digest; a tree is the image's own, or one that was made here."""
    return f"file:{artefact.sha256}" if artefact else f"tree:{image.id}:{'own' if known_by else socket.gethostname()}"


def _piece(host: Host, name: str, key: str, source: Source) -> _Piece:
    used_bytes = host.shell.call(files.disk_usage, Path(source.path))
    size_bytes = used_bytes if source.kind == transfer.TREE else host.shell.call(files.size, Path(source.path))
    part = Part(name=name, key=key, sha256="", size_bytes=size_bytes, used_bytes=used_bytes)
    return _Piece(part=part, source=source)


def _gather_state(host: Host, folder: Path, record: Record, snapshot: Snapshot) -> Source:
    store, call = host.store, host.shell.call
    call(files.make_directory, folder, 0o700)
    kept = store.snapshot(record.uuid, snapshot.id)
    paths = [kept / name for name in call(files.list_names, kept) if name != "domain.xml"]
    for path in (*paths, store.identity(record.uuid) / "hvctl.host_key", store.seed(record.uuid)):
        if call(files.exists, path):
            call(files.clone_file, path, folder / path.name, 0o600)
            call(files.set_time, folder / path.name, 0)
    call(files.set_time, folder, 0)  # so that the same makes the same archive
    return Source(kind=transfer.TREE, path=str(folder), name=folder.name)


def _find_known(repository: Repository, earlier: Sequence[Backup]) -> dict[str, Part]:
    """What earlier backups have stored, by what it is; the latest of each."""
    found = {part.key: part for backup in earlier for part in backup.parts if ":" in part.key}
    return {key: part for key, part in found.items() if repository.has(part)}


def _store(repository: Repository, pieces: _Pieces, known: dict[str, Part], frame: _Frame) -> Backup:
    host, record = repository.host, frame.lent.record
    everything = [*pieces.base_parts, *pieces.layers, pieces.state, *(piece for _disk, piece in pieces.volumes)]
    lacking = [piece for piece in everything if piece.part.key not in known]
    _check_space(repository, sum(piece.part.used_bytes for piece in lacking), record.name)
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
    before = {part.sha256 for backup in frame.earlier for part in backup.parts}
    volumes = tuple((_describe(disk), keep(piece)) for disk, piece in pieces.volumes)
    frame.lent.held.close()
    base_parts = tuple(keep(piece) for piece in pieces.base_parts)
    kept_layers = tuple(keep(piece) for piece in pieces.layers)
    state = keep(pieces.state)
    backup = Backup(
        id=f"{frame.lent.moment:%Y%m%d-%H%M%S-%f}",
        created_at=format_time(frame.lent.moment),
        host=socket.gethostname(),
        consistency=record.snapshots[-1].consistency,
        subject=_subject_of(record),
        image_id=pieces.image.id,
        base=pieces.base,
        base_parts=base_parts,
        layers=kept_layers,
        state=state,
        volumes=volumes,
        left_out=(
            *_list_left_out(record, with_volumes=frame.wanted.with_volumes),
            *([f"{left_out} device nodes"] if left_out else []),
        ),
        comment=frame.wanted.comment,
        definition=frame.lent.definition,
        stored_bytes=sum(part.size_bytes for part in stored if part.sha256 not in before),
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
            hint=f"delete old ones: {repository.command('delete NAME --keep daily=7')}",
        )


def _subject_of(record: Record) -> Subject:
    template = record.spec.template
    return Subject(
        uuid=record.uuid,
        spec=replace(record.spec, mounts=(), template=template if templates.is_name(template) else ""),
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


def _describe(disk: DataDisk) -> dict[str, str]:
    return {**metadata.format_disk(disk), "volume": ""}


def _list_left_out(record: Record, *, with_volumes: bool) -> list[str]:
    found = [
        f"shared directory --mount {mount.source}:{mount.target}{':ro' if mount.is_read_only else ''}"
        for mount in record.spec.mounts
    ]
    if not templates.is_name(record.spec.template):
        found.append(f"template --template {record.spec.template}")
    for disk in record.disks:
        if disk.kind is DiskKind.VOLUME and with_volumes:
            continue
        what = "volume" if disk.kind is DiskKind.VOLUME else f"{disk.kind} {disk.source}, disk"
        found.append(f"{what} {disk.name}")
    named = [item.name for item in record.snapshots if not item.purpose.is_passing]
    return [*found, *([f"its snapshots ({len(named)})"] if named else [])]
