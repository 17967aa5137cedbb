"""Restoring a backup: everything is brought into a directory of the store and checked, then an instance is made of it.

The definition is made anew from the template, never taken from the backup. Under its own name, where nothing of it
is left on this host, the instance keeps its identity (keys, machine id, MAC, its address where that is free); else it gets
a new one, as a copy does.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree

from hvctl import identity, images, metadata, operation
from hvctl.backends import Secrets, get_backend
from hvctl.backends.layers import Layers
from hvctl.backups.manifest import Backup, Part
from hvctl.backups.repository import Repository
from hvctl.errors import AlreadyExists, HostError, HvctlError, InvalidSpec, NotFound, UsageError
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import create, layers, lifecycle, query, volumes
from hvctl.instances.recovery import settle
from hvctl.instances.verbs import RESTORE
from hvctl.libvirtapi import domains
from hvctl.model import DataDisk, DiskKind, Image, Instance, Mode, Mount, Provision, Record, VolumeFormat, Wait
from hvctl.rootfs import building, intake, manifest, published, unpacked
from hvctl.rootfs.building import Building
from hvctl.units import GIB, MIB

# What may be in a backup's state, and how much of it at most.
_STATE = {
    "hvctl.host_key": 64 * 1024,
    "seed.iso": 64 * MIB,
    "nvram.fd": 64 * MIB,
    "tpm.permall": 16 * MIB,
    "vmlinuz": 256 * MIB,
    "initrd": 1 * GIB,
}
_KEY, _SEED = "hvctl.host_key", "seed.iso"
_RESERVE_BYTES = 256 * MIB


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `backup restore` is asked for."""

    backup: str
    """`NAME@ID`, or `NAME` for its latest."""
    name: str = ""
    """Empty: its own."""
    template: str = ""
    """Empty: the one that it was made from, which this host must have."""
    cpus: int | None = None
    memory_bytes: int | None = None
    """None: as many, and as much, as it had."""
    mounts: tuple[Mount, ...] = ()
    """Directories of this host that a container shares; a backup says nothing of those."""
    is_privileged: bool = False
    """Whether a container's root may be this host's, where the backup is of such a one."""
    is_trusted: bool = False
    """Whether this host's kernel may mount file systems of volumes, which could have been made to attack it."""
    with_volumes: bool = True
    start: bool = True
    wait: Wait = Wait.SSH
    timeout_s: float = 180.0


@dataclass(frozen=True, kw_only=True)
class _Brought:
    """What came of a backup, checked, in a directory of the store."""

    image: Image
    is_new_image: bool
    """Whether it is still to be put into the store."""
    layers: tuple[str, ...]
    """Lowest first, in `folder`."""
    folder: Path
    state: Path
    disks: tuple[DataDisk, ...]
    """Its data volumes; each lies in `folder` under its identifier."""


def restore(host: Host, repository: Repository, request: Request, events: Sink = ignore) -> Instance:
    """Make an instance of a backup, and start it unless told otherwise.

    Raises NotFound, AlreadyExists for a taken name, InvalidSpec with what is damaged, HostError without space, all
    before there is an instance; a failure leaves nothing, a start that fails a stopped instance.
    """
    host.require_root("backup restore")
    repository.check()
    backup = repository.get_backup(request.backup)
    name = identity.check_name(request.name or backup.name)
    _check(backup, request)
    with host.lock(name):
        if not _adopt(host, name):
            _restore(host, repository, backup, replace(request, name=name), events)
    if request.start:
        lifecycle.start(host, name, goal=request.wait, timeout_s=request.timeout_s, events=events)
    return query.get(host, name)


def _check(backup: Backup, request: Request) -> None:
    if backup.subject.spec.is_privileged and not request.is_privileged:
        raise UsageError(
            f"{backup.name!r} was a privileged container: its root would be this host's root",
            hint="if that is what you want, and you trust the backup: --privileged",
        )
    if not (backup.subject.spec.template or request.template):
        raise UsageError(
            f"{backup.name!r} was made from a template that is a file, and that is not in the backup",
            hint="--template FILE",
        )
    if backup.subject.provision is Provision.PROCESS:
        raise InvalidSpec(f"the backup of {backup.name!r} is of an application", hint="make it anew: hvctl create")


def _adopt(host: Host, name: str) -> bool:
    """Whether an interrupted restore under this name had come so far that it was finished now. Raises AlreadyExists."""
    existing, done = query.find(host, name), ""
    if existing is not None and existing.record.pending is not None:
        query.check_has_name(existing, name)
        done = settle(host, existing.record)
        existing = query.find(host, name)
    if existing is None:
        return False
    if done == f"finished {RESTORE.name}":
        building.collect(host)  # what the process that was killed had unpacked
        return True
    raise AlreadyExists(
        f"there is already an instance {name!r} ({existing.state})",
        hint="restore under another name: hvctl backup restore BACKUP NAME",
    )


def _restore(host: Host, repository: Repository, backup: Backup, request: Request, events: Sink) -> None:
    mode_layers = get_backend(backup.subject.spec.mode).layers
    image = _find_image(host, backup)
    if image is None and not backup.base_parts:
        raise NotFound(
            f"the backup is without its image, and this host has not {backup.subject.spec.image!r} as it was then",
            hint="bring it from the host that has it: hvctl image export, hvctl image import",
        )
    chosen = backup.volumes if request.with_volumes else ()
    disks = _plan_disks(backup, request, [disk for disk, _part in chosen])
    parts = (
        *(backup.base_parts if image is None else ()),
        *(*backup.layers, backup.state),
        *(part for _disk, part in chosen),
    )
    missing = next((part for part in parts if not repository.has(part)), None)
    if missing is not None:
        raise repository.damaged(missing, "it is not there")
    # One part at a time is there twice: as it comes, and unpacked.
    needed_bytes = sum(part.used_bytes for part in parts) + max(part.used_bytes for part in parts) + _RESERVE_BYTES
    building.check_space(host, f"restoring {backup.name}@{backup.id}", needed_bytes)
    with building.begin(host, request.name, events) as work:
        source = _Source(repository, work, events, request.name)
        state = source.bring_state(backup.state)
        is_new_image = image is None
        if image is None:
            image = source.bring_image(mode_layers, backup)
        folder = work.directory / "layers"
        host.shell.call(files.make_directory, folder, 0o700)
        stack: list[str] = []
        for part in backup.layers:
            layer, content = str(uuid4()), source.bring(part)
            parent = stack[-1] if stack else ""
            mode_layers.write_layer(host, image, parent, content, folder / layer)
            stack.append(layer)
        for disk, (_fields, part) in zip(disks, chosen, strict=True):
            source.bring_volume(disk, part, folder / disk.volume)
        brought = _Brought(
            image=image, is_new_image=is_new_image, layers=tuple(stack), folder=folder, state=state, disks=disks
        )
        try:
            _build(host, work, backup, brought, request)
        except BaseException:
            with contextlib.suppress(HvctlError):
                images.prune(host)
            raise


@dataclass(frozen=True)
class _Source:
    """A repository, and where its content goes to."""

    repository: Repository
    work: Building
    events: Sink
    name: str

    def bring(self, part: Part) -> Path:
        """One part as a file, its digest checked."""
        target = self.work.directory / f"part-{part.name}"
        self.repository.load(part, target, self.events, self.name)
        return target

    def bring_state(self, part: Part) -> Path:
        """A directory with files that a state may have, and nothing else."""
        call, folder = self.work.host.shell.call, self.work.directory / "given"
        unpacked.unpack(self.work.host, self.bring(part), folder, "state")
        state = folder / "state"
        names = call(files.list_names, state)
        for name in names:
            most_bytes = _STATE.get(name, -1)
            if not call(files.is_regular, state / name) or call(files.size, state / name) > most_bytes:
                raise InvalidSpec(
                    f"the backup's state holds {name[:80]!r}, which cannot be", hint="restore another one"
                )
            call(files.set_owner, state / name, 0, 0)
            call(files.set_mode, state / name, 0o600)
        return state

    def bring_volume(self, disk: DataDisk, part: Part, aside: Path) -> None:
        """A data volume, as `volumes.make` makes an empty one, but for what describes it."""
        host, call = self.work.host, self.work.host.shell.call
        content = self.bring(part)
        if disk.format is VolumeFormat.DIRECTORY:
            unpacked.unpack(host, content, aside, "data")
            return
        facts = intake.check_disk(host, content, format=disk.format)
        if facts.virtual_bytes != disk.size_bytes:
            raise InvalidSpec(f"volume {disk.name!r} is not as long as it should be", hint="restore another backup")
        call(files.make_directory, aside, 0o711)
        call(files.set_mode, content, 0o600)
        call(files.replace_if_there, content, aside / f"disk.{disk.format}")

    def bring_image(self, mode_layers: Layers, backup: Backup) -> Image:
        """What the instance stands on, as an image in the making; sealed, not yet in the store."""
        host, work, base = self.work.host, self.work, _complete(backup)
        mode_layers.write_base(work, base, {part.name: self.bring(part) for part in backup.base_parts})
        image = manifest.seal(replace(base, name="", source=f"backup {backup.name}@{backup.id}"))
        content = manifest.format_manifest(image)
        host.shell.call(files.write_file, work.image / "manifest.json", content, 0o444)
        host.shell.call(files.set_mode, work.image, 0o711)
        return image


def _complete(backup: Backup) -> Image:
    """The description of what it stands on; a tree is known by its archive."""
    tree = next((part.sha256 for part in backup.base_parts if part.name == "tree.tar"), "")
    return replace(backup.base, tree_digest=f"sha256:{tree}" if tree else "")


def _find_image(host: Host, backup: Backup) -> Image | None:
    """The image of this host that has the very base of the backup, or None."""
    base, mode_layers = _complete(backup), get_backend(backup.subject.spec.mode).layers
    for image_id in filter(None, (backup.image_id, manifest.seal(replace(base, name="")).id)):
        with contextlib.suppress(HvctlError):
            image = published.read(host, image_id, backup.subject.spec.image)
            if mode_layers.has_base(host, image, base):
                return image
    return None


def _plan_disks(backup: Backup, request: Request, described: list[dict[str, str]]) -> tuple[DataDisk, ...]:
    """The disks of a restored instance, checked by its mode. Raises InvalidSpec, Unsupported."""
    subject = backup.subject
    record = Record(
        uuid=subject.uuid,
        spec=replace(subject.spec, name=request.name, mounts=request.mounts),
        store=Path("/"),
        image_id="",
        layers=(),
        network="",
        mac="",
    )
    for fields in described:
        try:
            disk = metadata.parse_disk(fields)
        except (KeyError, ValueError) as error:
            raise InvalidSpec("a volume of the backup cannot be", hint="restore another one") from error
        identity.check_name(disk.name)
        disk = replace(disk, kind=DiskKind.VOLUME, volume=str(uuid4()), source="")
        disk = get_backend(subject.spec.mode).disks.plan_again(record, disk, is_trusted=request.is_trusted)
        record = replace(record, disks=(*record.disks, disk))
    return record.disks


def _build(host: Host, work: Building, backup: Backup, brought: _Brought, request: Request) -> None:
    plan, is_same = _make_plan(host, backup, brought, request, work.events)
    backend = get_backend(plan.record.mode)
    connection = host.connection(plan.record.mode)

    def claim(record: Record) -> object:
        return domains.define(connection, metadata.embed(backend.format_stub(record), record))

    with operation.begin(host, RESTORE, plan.record, claim, work.events) as change:
        with backend.allocate(host, change.record) as allocated, change.step("address", allocated):
            pass  # it stands in libvirt now: the next one may choose
        wanted = backup.subject.address if is_same else ""
        change.record = replace(change.record, address=create.reserve(host, change.record, wanted))
        with change.step("image"):
            if brought.is_new_image:
                published.place(host, work.image, brought.image)
            published.read(host, brought.image.id, plan.record.spec.image)  # it may have gone meanwhile
        with change.step("files"):
            backend.create_files(host, change.record, plan.image, plan.secrets)
            _place_state(host, change.record, brought, is_same=is_same)
        with change.step("root"):
            for layer in brought.layers:
                host.shell.call(files.publish, brought.folder / layer, host.store.layer(layer))
            below = brought.layers[-1] if brought.layers else ""
            backend.layers.create(host, change.record, plan.image, change.record.layers[-1], below)
            if not is_same:
                backend.layers.begin_copy(host, change.record, plan.secrets.host_key)
        with change.step("volumes"):
            for disk in brought.disks:
                host.shell.call(files.publish, brought.folder / disk.volume, host.store.volume(disk.volume))
                volumes.note(host, disk, change.record.name)
        change.commit("define", _format_xml(host, plan, change.record, is_same=is_same))
        change.redo_after("define")


def _make_plan(
    host: Host, backup: Backup, brought: _Brought, request: Request, events: Sink
) -> tuple[create.Plan, bool]:
    """As for a new instance; and whether it is to be the same one as it was."""
    subject = backup.subject
    is_same = request.name == backup.name and _is_gone(host, backup, events)
    spec = replace(
        subject.spec,
        name=request.name,
        cpus=request.cpus or subject.spec.cpus,
        memory_bytes=request.memory_bytes or subject.spec.memory_bytes,
        mounts=request.mounts,
        template=request.template or subject.spec.template,
        autostart=is_same and subject.spec.autostart,
    )
    wanted = create.Request(spec=spec, authorized_keys=subject.authorized_keys, start=False)
    plan = create.make_plan(host, wanted, brought.image)
    if plan.note:
        events(Note(request.name, plan.note))
    private = _read_key(host, brought.state) if is_same else b""
    key = identity.KeyPair(private=private, public=identity.public_of(private)) if private else identity.new_key_pair()
    record = replace(
        plan.record,
        layers=(*brought.layers, plan.record.layers[-1]),
        host_key=key.public,
        kernel_release=subject.kernel_release,
        login_user=subject.login_user,
        labels=subject.labels,
        keep=subject.keep,
        disks=brought.disks,
    )
    if is_same:
        record = replace(record, uuid=subject.uuid, mac=subject.mac, created_at=subject.created_at)
    if len(record.layers) > layers.DEEPEST:
        raise InvalidSpec(f"the backup has {len(backup.layers)} layers, which is too many", hint="restore another one")
    return replace(plan, record=record, secrets=Secrets(host_key=key.private, is_copy=not is_same)), is_same


def _is_gone(host: Host, backup: Backup, events: Sink) -> bool:
    """Whether nothing of an instance is left on this host, so that it can be there again."""
    subject = backup.subject
    others = [item for item in layers.list_records(host) if subject.uuid == item.uuid or subject.mac == item.mac]
    is_there = any(domains.find_by_uuid(host.connection(mode), subject.uuid) is not None for mode in Mode)
    if not others and not is_there and not host.shell.call(files.exists, host.store.instance(subject.uuid)):
        return True
    where = f"by {others[0].name!r}" if others else "by what is left of it in the store"
    events(Note(backup.name, f"its identity (UUID, MAC) is used {where}: it gets a new one, and new keys"))
    return False


def _read_key(host: Host, state: Path) -> bytes:
    """The private ssh host key; empty where there is none. Raises InvalidSpec."""
    if not host.shell.call(files.exists, state / _KEY):
        return b""
    content = host.shell.call(files.read_file, state / _KEY)
    try:
        identity.public_of(content)
    except ValueError as error:
        raise InvalidSpec("the backup's ssh host key is none", hint="restore another one") from error
    return content


def _place_state(host: Host, record: Record, brought: _Brought, *, is_same: bool) -> None:
    """NVRAM, TPM state and kernel, as for a copy; of the same instance the seed, too, with its user data."""
    mode_layers, image, call = get_backend(record.mode).layers, brought.image, host.shell.call
    names = call(files.list_names, brought.state)
    if record.kernel_release not in ("", image.kernel_release) and not {"vmlinuz", "initrd"} <= set(names):
        raise HostError("the backup lacks the kernel that it boots", hint="restore another one")
    fresh = replace(record, kernel_release=image.kernel_release)
    mode_layers.take_state(host, fresh, record, image, brought.state)
    mode_layers.swap_state(host, record)
    if is_same and _SEED in names:
        call(files.remove, host.store.seed(record.uuid))
        call(files.clone_file, brought.state / _SEED, host.store.seed(record.uuid), 0o600)


def _format_xml(host: Host, plan: create.Plan, record: Record, *, is_same: bool) -> str:
    domain, backend = ElementTree.fromstring(create.format_xml(host, plan, record)), get_backend(record.mode)
    if not is_same:
        backend.layers.adapt_copy(domain, record)
    for disk in record.disks:
        backend.disks.add_to(host, record, domain, disk)
    return ElementTree.tostring(domain, encoding="unicode")
