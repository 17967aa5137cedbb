"""Copies of instances: a new writable layer on the layers of another, under an identity of its own.

What is copied is always a snapshot: one that was named, or one that is taken for the purpose and forgotten afterwards.
From its first record on a copy names the layers that it stands on, so nobody can take them away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree

from hvctl import identity, metadata, operation
from hvctl.access import keys
from hvctl.backends import Secrets, get_backend
from hvctl.errors import AlreadyExists, NotFound, UsageError, WrongState
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import create, layers, lifecycle, query, snapshots
from hvctl.instances.claim import claim_new
from hvctl.instances.recovery import get_settled, settle
from hvctl.instances.snapshots import Take
from hvctl.instances.verbs import COPY
from hvctl.model import Image, Instance, Purpose, Record, Snapshot, Wait
from hvctl.units import now
from hvctl.values import dataclass

_SOURCE_TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `copy` is asked for."""

    source: str
    name: str
    snapshot: str = ""
    """Empty: the source as it is now."""
    is_full: bool = False
    """Layers of its own, in place of the source's; the image alone is shared."""
    start: bool = True
    wait: Wait = Wait.SSH
    timeout_s: float = 180.0


@dataclass(frozen=True, kw_only=True)
class _Plan:
    origin: Record
    """The source as it was when the snapshot was taken."""
    source: Record
    snapshot: Snapshot
    record: Record
    image: Image
    secrets: Secrets
    runs: tuple[tuple[str, ...], ...] = ()
    """Of a full copy: the source's layers that each of its own, but for the last, is made of."""


def copy(host: Host, request: Request, events: Sink = ignore) -> Instance:
    """Make an instance that begins as another is, or was: with a name, keys, address and ids of its own.

    Data disks are left out; user data is not run again. Raises AlreadyExists, NotFound, WrongState, HostError. A
    failure before it is complete leaves nothing; a start that fails, a stopped instance.
    """
    host.require_root("copy")
    identity.check_name(request.name)
    if request.name == request.source:
        raise UsageError(f"{request.source!r} cannot be copied onto itself", hint="choose another name")
    origin = query.get(host, request.source).record
    query.check_is_system(origin, hint=_how_to_make(request.name, origin))
    with host.lock(request.source, timeout_s=_SOURCE_TIMEOUT_S), host.lock(request.name):
        if not _adopt(host, request.name):
            with _snapshot_of(host, request, events) as (source, snapshot):
                _build(host, _make_plan(host, request, source, snapshot), events)
    if request.start:
        lifecycle.start(host, request.name, goal=request.wait, timeout_s=request.timeout_s, events=events)
    return query.get(host, request.name)


def _how_to_make(name: str, record: Record) -> str:
    return f"make another: hvctl create {name} --image {record.spec.image} --{record.mode}"


@contextlib.contextmanager
def _snapshot_of(host: Host, request: Request, events: Sink) -> Iterator[tuple[Record, Snapshot]]:
    """The source and what of it is to be copied; for the block, where no snapshot was named."""
    if request.snapshot:
        source = get_settled(host, request.source).record
        yield source, snapshots.get_snapshot(source, request.snapshot)
        return
    taken = snapshots.take_locked(host, request.source, Take(purpose=Purpose.COPY), events)
    try:
        yield query.get(host, request.source).record, taken
    finally:
        record = query.get(host, request.source).record
        if record.pending is None and not host.cancelled.is_set():  # else `gc` does it
            snapshots.delete_locked(host, record, taken, events)


def _adopt(host: Host, name: str) -> bool:
    """Whether an interrupted copy under this name had come so far that it was finished now. Raises AlreadyExists."""
    existing, done = query.find(host, name), ""
    if existing is not None and existing.record.pending is not None:
        query.check_has_name(existing, name)
        done = settle(host, existing.record)
        existing = query.find(host, name)
    if existing is None:
        return False
    if done == f"finished {COPY.name}":
        return True
    raise AlreadyExists(
        f"there is already an instance {name!r} ({existing.state})",
        hint=f"choose another name, or: hvctl delete {name}",
    )


def _make_plan(host: Host, request: Request, source: Record, snapshot: Snapshot) -> _Plan:
    xml = host.read_text(host.store.snapshot(source.uuid, snapshot.id) / "domain.xml")
    origin = metadata.find(xml)
    if origin is None:
        raise NotFound(f"snapshot {snapshot.name!r} has lost its definition", hint="copy another one")
    take_key = keys.begin_pair()
    stack = layers.stack_of(host, snapshot.layer)
    runs: tuple[tuple[str, ...], ...] = ()
    if request.is_full:
        runs = tuple(get_backend(origin.mode).layers.group(host, stack))
        needed_bytes = sum(host.shell.call(files.disk_usage, host.store.layer(layer)) for layer in stack)
        layers.check_space(host, needed_bytes, what=f"a full copy of {source.name!r}")
        stack = tuple(str(uuid4()) for _run in runs)
    key = take_key()
    # Named one by one: what a record gets to own later on is not to be owned twice by an oversight here.
    record = Record(
        uuid=uuid4(),
        spec=replace(origin.spec, name=request.name, autostart=False),
        store=origin.store,
        image_id=origin.image_id,
        layers=(*stack, str(uuid4())),
        network=origin.network,
        mac=identity.new_mac(),
        login_user=origin.login_user,
        host_key=key.public,
        authorized_keys=origin.authorized_keys,
        accelerator=origin.accelerator,
        provision=origin.provision,
        kernel_release=origin.kernel_release,
        created_at=now(),
        labels=origin.labels,
    )
    if len(record.layers) > layers.DEEPEST:
        raise WrongState(
            f"{source.name!r} stands on too many layers to be copied", hint="hvctl copy --full, or: hvctl gc"
        )
    return _Plan(
        origin=origin,
        source=source,
        snapshot=snapshot,
        record=record,
        image=layers.image_of(host, source),
        secrets=Secrets(host_key=key.private, is_copy=True),
        runs=runs,
    )


def _build(host: Host, plan: _Plan, events: Sink) -> None:
    backend = get_backend(plan.record.mode)
    with operation.begin(host, COPY, plan.record, claim_new(host), events) as change:
        with backend.allocate(host, change.record) as allocated, change.step("address", allocated):
            pass  # it stands in libvirt now: the next one may choose
        change.record = replace(change.record, address=create.reserve(host, change.record))
        with change.step("files"):
            backend.create_files(host, change.record, plan.image, plan.secrets)
            _take_state(host, change.record, plan)
        with change.step("root"):
            _create_root(host, change.record, plan)
        change.commit("define", _format_xml(host, change.record, plan))
        change.redo_after("define")


def _take_state(host: Host, record: Record, plan: _Plan) -> None:
    """NVRAM, TPM state and the kernel, where it is not the image's, which `create_files` has put there."""
    mode_layers = get_backend(record.mode).layers
    fresh = replace(record, kernel_release=plan.image.kernel_release)
    folder = host.store.snapshot(plan.source.uuid, plan.snapshot.id)
    mode_layers.take_state(host, fresh, record, plan.image, folder)
    mode_layers.swap_state(host, record)


def _create_root(host: Host, record: Record, plan: _Plan) -> None:
    mode_layers = get_backend(record.mode).layers
    *below, top = record.layers
    parent = ""
    for run, layer in zip(plan.runs, below, strict=False):
        aside = host.store.layer(layer)
        host.shell.call(files.remove, aside)
        mode_layers.merge(host, plan.image, run, parent, aside)
        parent = layer
    mode_layers.create(host, record, plan.image, top, below[-1] if below else "")
    mode_layers.begin_copy(host, record, plan.secrets.host_key)


def _format_xml(host: Host, record: Record, plan: _Plan) -> str:
    """The definition of then, with everything in it that is the source's own made the copy's."""
    store, origin = host.store, plan.origin
    text = host.read_text(store.snapshot(plan.source.uuid, plan.snapshot.id) / "domain.xml")
    domain = ElementTree.fromstring(text)
    for tag, value in (("name", record.name), ("uuid", str(record.uuid))):
        element = domain.find(tag)
        assert element is not None
        element.text = value
    _leave_out_disks(host, domain, plan.origin)
    own, new = str(store.instance(origin.uuid)), str(store.instance(record.uuid))
    words = {origin.mac: record.mac, origin.device: record.device}
    for element in domain.iter():
        for name, value in element.attrib.items():
            element.set(name, words.get(value, value.replace(f"{own}/", f"{new}/")))
        if element.text and own in element.text:
            element.text = element.text.replace(f"{own}/", f"{new}/")
    backend = get_backend(record.mode)
    backend.layers.adapt_copy(domain, record)
    xml = backend.layers.restack(host, record, plan.image, ElementTree.tostring(domain, encoding="unicode"))
    return metadata.embed(xml, record)


def _leave_out_disks(host: Host, domain: ElementTree.Element, source: Record) -> None:
    """Take out the disks that are neither its root nor lie in its own directory, and directories that are no shares."""
    devices = domain.find("devices")
    assert devices is not None
    own = host.store.instance(source.uuid)
    for disk in devices.findall("disk"):
        element = disk.find("source")
        path = element.get("file", "") if element is not None else ""
        if not path.startswith((f"{host.store.layers}/", f"{own}/")):
            devices.remove(disk)
    shares = [str(number) for number in range(len(source.spec.mounts))]
    for directory in devices.findall("filesystem"):
        element = directory.find("source")
        place = Path(element.get("dir", "/")) if element is not None else Path("/")
        if place.parent == own / "mounts" and place.name not in shares:
            devices.remove(directory)
