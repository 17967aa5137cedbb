"""Restoring a backup: everything is brought into a directory of the store and checked, then an instance is made of it.

The definition is made anew from the template, never taken from the backup. Under its own name, where nothing of it
is left on this host, the instance keeps its identity (keys, machine id, MAC, its address where that is free); else it gets
a new one, as a copy does.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree

from hvctl import identity, images, metadata, operation
from hvctl.access import keys
from hvctl.backends import Secrets, get_backend
from hvctl.backups.bringing import SEED, Bringing, Brought, read_key
from hvctl.backups.manifest import Backup
from hvctl.backups.repository import Repository
from hvctl.errors import AlreadyExists, HvctlError, InvalidSpec, NotFound, Unsupported, UsageError
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import create, layers, lifecycle, query, volumes
from hvctl.instances.claim import claim_new
from hvctl.instances.recovery import settle
from hvctl.instances.verbs import RESTORE
from hvctl.libvirtapi import domains
from hvctl.model import DataDisk, DiskKind, Image, Instance, Mode, Mount, Provision, Record, Spec, Wait
from hvctl.rootfs import building, manifest, published
from hvctl.rootfs.building import Building
from hvctl.units import MIB, format_size
from hvctl.values import dataclass

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
class _Restoring:
    """A backup that is to become an instance: everything that could be checked without its content is."""

    backup: Backup
    plan: create.Plan
    is_same: bool
    """Whether it keeps its identity."""


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
        if not _adopt(host, repository, name):
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


def _adopt(host: Host, repository: Repository, name: str) -> bool:
    """Whether an interrupted restore under this name had come so far that it was finished now. Raises AlreadyExists."""
    existing, done = query.find(host, name), ""
    if existing is not None and existing.record.pending is not None:
        query.check_has_name(existing, name)
        done = settle(host, existing.record)
        existing = query.find(host, name)
    if existing is None:
        return False
    if done == f"finished {RESTORE.name}":
        building.collect(host)  # where its content came from
        return True
    raise AlreadyExists(
        f"there is already an instance {name!r} ({existing.state})",
        hint=f"restore under another name: {repository.command(f'restore {name} NEW-NAME')}",
    )


def _restore(host: Host, repository: Repository, backup: Backup, request: Request, events: Sink) -> None:
    found = _find_image(host, backup)
    if found is None and not backup.base_parts:
        raise NotFound(
            f"the backup is without its image, and this host has not {backup.subject.spec.image!r} as it was then",
            hint="bring it from the host that has it: hvctl image export, hvctl image import",
        )
    what = _plan(host, backup, found or _describe_image(backup), request, events)
    volumes_of = backup.volumes if request.with_volumes else ()
    parts = (
        *(backup.base_parts if found is None else ()),
        *(*backup.layers, backup.state),
        *(part for _disk, part in volumes_of),
    )
    missing = next((part for part in parts if not repository.has(part)), None)
    if missing is not None:
        raise repository.damaged(missing, "it is not there")
    # One part at a time is there twice: as it comes, and unpacked.
    needed_bytes = sum(part.used_bytes for part in parts) + max(part.used_bytes for part in parts) + _RESERVE_BYTES
    building.check_space(host, f"restoring {backup.name}@{backup.id}", needed_bytes)
    with building.begin(host, request.name, events) as work:
        source = Bringing(repository=repository, backup=backup, work=work, events=events)
        brought = source.bring(what.plan.record, what.plan.image, with_image=found is None)
        what = replace(what, plan=_with_keys(host, what, brought))
        try:
            _build(host, work, what, brought)
        except BaseException:
            with contextlib.suppress(HvctlError):
                images.prune(host)
            raise


def _describe_image(backup: Backup) -> Image:
    """The image that comes with a backup, sealed; a tree is known by its archive."""
    tree = next((part.sha256 for part in backup.base_parts if part.name == "tree.tar"), "")
    source = f"backup {backup.name}@{backup.id}"
    image = replace(backup.base, tree_digest=f"sha256:{tree}" if tree else "", source=source)
    return replace(manifest.seal(image), name=backup.subject.spec.image)


def _find_image(host: Host, backup: Backup) -> Image | None:
    """The image of this host that has the very base of the backup, or None."""
    described, mode_layers = _describe_image(backup), get_backend(backup.subject.spec.mode).layers
    for image_id in filter(None, (backup.image_id, described.id)):
        with contextlib.suppress(HvctlError):
            image = published.read(host, image_id, backup.subject.spec.image)
            if mode_layers.has_base(host, image, described):
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


def _build(host: Host, work: Building, what: _Restoring, brought: Brought) -> None:
    plan, is_same = what.plan, what.is_same
    backend = get_backend(plan.record.mode)
    with operation.begin(host, RESTORE, plan.record, claim_new(host), work.events) as change:
        with backend.allocate(host, change.record) as allocated, change.step("address", allocated):
            pass  # it stands in libvirt now: the next one may choose
        wanted = what.backup.subject.address if is_same else ""
        change.record = replace(change.record, address=create.reserve(host, change.record, wanted))
        with change.step("image"):
            if brought.has_image:
                published.place(host, work.image, plan.image)
            published.read(host, plan.image.id, plan.record.spec.image)  # it may have gone meanwhile
        with change.step("files"):
            backend.create_files(host, change.record, plan.image, plan.secrets)
            _place_state(host, change.record, plan.image, brought.state, is_same=is_same)
        with change.step("root"):
            _place_root(host, change.record, plan, brought, is_same=is_same)
        with change.step("volumes"):
            for disk in change.record.disks:
                host.shell.call(files.publish, brought.folder / disk.volume, host.store.volume(disk.volume))
                volumes.note(host, disk, change.record.name)
        change.commit("define", _format_xml(host, plan, change.record, is_same=is_same))
        change.redo_after("define")


def _place_root(host: Host, record: Record, plan: create.Plan, brought: Brought, *, is_same: bool) -> None:
    mode_layers, (*below, top) = get_backend(record.mode).layers, record.layers
    for layer in below:
        host.shell.call(files.publish, brought.folder / layer, host.store.layer(layer))
    mode_layers.create(host, record, plan.image, top, below[-1] if below else "")
    if not is_same:
        mode_layers.begin_copy(host, record, plan.secrets.host_key)


def _plan(host: Host, backup: Backup, image: Image, request: Request, events: Sink) -> _Restoring:
    """As for a new instance, before anything is read: what this host cannot do is found here."""
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
    if len(backup.layers) >= layers.DEEPEST:
        raise InvalidSpec(f"the backup has {len(backup.layers)} layers, which is too many", hint="restore another one")
    described = [disk for disk, _part in backup.volumes] if request.with_volumes else []
    disks = _plan_disks(backup, replace(request, mounts=spec.mounts), described)
    spec = _fit_size(host, spec, image, events)
    wanted = create.Request(spec=spec, authorized_keys=subject.authorized_keys, start=False)
    plan = create.make_plan(host, wanted, image)
    if plan.note:
        events(Note(request.name, plan.note))
    record = replace(
        plan.record,
        layers=(*(str(uuid4()) for _part in backup.layers), plan.record.layers[-1]),
        kernel_release=subject.kernel_release,
        login_user=subject.login_user,
        labels=subject.labels,
        disks=disks,
    )
    if is_same:
        record = replace(record, uuid=subject.uuid, mac=subject.mac, created_at=subject.created_at, keep=subject.keep)
    return _Restoring(backup=backup, plan=replace(plan, record=record), is_same=is_same)


def _fit_size(host: Host, spec: Spec, image: Image, events: Sink) -> Spec:
    """The spec without a size of its root where this host can give it none."""
    try:
        if spec.disk_bytes:
            get_backend(spec.mode).check_disk(host, spec, image)
    except Unsupported as error:
        events(Note(spec.name, f"its root is without its limit of {format_size(spec.disk_bytes)}: {error.message}"))
        return replace(spec, disk_bytes=0)
    return spec


def _with_keys(host: Host, what: _Restoring, brought: Brought) -> create.Plan:
    """The plan with the ssh host key that it had, where it is to be the same, or else a new one."""
    key = (what.is_same and read_key(host, brought.state)) or keys.new_pair()
    return replace(
        what.plan,
        record=replace(what.plan.record, host_key=key.public),
        secrets=Secrets(host_key=key.private, is_copy=not what.is_same),
    )


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


def _place_state(host: Host, record: Record, image: Image, state: Path, *, is_same: bool) -> None:
    """NVRAM, TPM state and kernel, as for a copy; of the same instance the seed, too, with its user data."""
    mode_layers, call = get_backend(record.mode).layers, host.shell.call
    names = call(files.list_names, state)
    if record.kernel_release not in ("", image.kernel_release) and not {"vmlinuz", "initrd"} <= set(names):
        raise InvalidSpec("the backup lacks the kernel that it boots", hint="restore another one")
    mode_layers.take_state(host, replace(record, kernel_release=image.kernel_release), record, image, state)
    mode_layers.swap_state(host, record)
    if is_same and SEED in names:
        call(files.remove, host.store.seed(record.uuid))
        call(files.clone_file, state / SEED, host.store.seed(record.uuid), 0o600)


def _format_xml(host: Host, plan: create.Plan, record: Record, *, is_same: bool) -> str:
    domain, backend = ElementTree.fromstring(create.format_xml(host, plan, record)), get_backend(record.mode)
    if not is_same:
        backend.layers.adapt_copy(domain, record)
    for disk in record.disks:
        backend.disks.add_to(host, record, domain, disk)
    return ElementTree.tostring(domain, encoding="unicode")
