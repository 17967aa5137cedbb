"""Snapshots of an instance: take, revert, delete, list; the same in both modes.

A snapshot is a layer that is never written again, with the definition of that time. An instance that is off gets a new
layer on top; so does a running VM. The top of a running container is copied aside, while the container is held still.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from dataclasses import replace
from uuid import uuid4
from xml.etree import ElementTree

from hvctl import metadata, operation
from hvctl.backends import get_backend
from hvctl.errors import AlreadyExists, GuestFailed, InvalidSpec, NotFound, WrongState
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import effects, layers, lifecycle, query, snapeffects, wait, wake
from hvctl.instances.claim import claim_existing
from hvctl.instances.recovery import get_settled
from hvctl.instances.snapeffects import ASIDE, GROW, NAME
from hvctl.instances.verbs import FORGET, REVERT, TAKE
from hvctl.libvirtapi import domains
from hvctl.model import Consistency, Image, Instance, Purpose, Record, Snapshot, State, Wait
from hvctl.units import format_time
from hvctl.values import dataclass

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
AUTOMATIC = "auto-"
_OFF = (State.STOPPED, State.CRASHED)
_ON = (State.RUNNING, State.PAUSED)
_COMMENT_LIMIT = 200


@dataclass(frozen=True, kw_only=True)
class Take:
    """What `take` is asked for."""

    name: str = ""
    """Empty: the time makes one."""
    comment: str = ""
    with_memory: bool = False
    purpose: Purpose = Purpose.USER


def check_name(name: str) -> str:
    """The name, if a snapshot may have it. Raises InvalidSpec."""
    if not _NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name[:80]!r} cannot be the name of a snapshot",
            hint="use 1 to 63 lower-case letters, digits, '.', '_' and '-'",
        )
    if name.startswith(AUTOMATIC):
        raise InvalidSpec(f"{name!r} is how a schedule names its own", hint=f"leave {AUTOMATIC!r} away")
    return name


def list_snapshots(record: Record) -> tuple[Snapshot, ...]:
    """The snapshots of an instance, oldest first; not those that last only as long as a copy or backup is made."""
    return tuple(item for item in record.snapshots if not item.purpose.is_passing)


def get_snapshot(record: Record, name: str) -> Snapshot:
    """The snapshot of this name. Raises NotFound."""
    found = next((item for item in list_snapshots(record) if item.name == name), None)
    if found is None:
        raise NotFound(f"{record.name!r} has no snapshot {name!r}", hint=f"hvctl snapshot list {record.name}")
    return found


def measure(host: Host, record: Record, snapshot: Snapshot) -> int:
    """Bytes that its own layer and the files beside it take."""
    paths = [host.store.snapshot(record.uuid, snapshot.id)]
    paths += [host.store.layer(snapshot.layer)] if snapshot.layer else []
    return sum(host.shell.call(files.disk_usage, path) for path in paths if host.shell.call(files.exists, path))


def diff(host: Host, name: str, old: str, new: str = "", events: Sink = ignore) -> list[tuple[str, str]]:
    """What changed from one snapshot to another, or to what an instance that is off is now: (kind, path), by path.

    The kinds are `added`, `changed` and `removed`; changed is content, owner, mode or kind, not a time. Raises NotFound,
    Unsupported for files that cannot be read here, and WrongState while it runs and no second snapshot is named.
    """
    host.require_root("snapshot diff")
    with host.lock(name):
        instance = query.get_complete(host, name)
        record = instance.record
        for item in filter(None, (old, new)):
            _check_mode(record, get_snapshot(record, item))
        layer = get_snapshot(record, old).layer
        if new:
            top = get_snapshot(record, new).layer
        elif instance.state in _OFF:
            top = record.layers[-1]
        else:
            raise WrongState(
                f"{name!r} is {instance.state}, and what it is now can be looked at while it is off alone",
                hint=f"hvctl snapshot take {name} now, then: hvctl snapshot diff {name} {old} now",
            )
        image = layers.image_of(host, record)
        return get_backend(record.mode).list_differences(host, record, image, (layer, top), events)


def take(host: Host, name: str, request: Take, events: Sink = ignore) -> Snapshot:
    """Keep what an instance is at this moment, running or not.

    Raises AlreadyExists for a taken name, WrongState, Unsupported for memory that cannot be kept, HostError without
    space. A failure leaves it as it was and running.
    """
    host.require_root("snapshot take")
    if request.name and request.purpose is Purpose.USER:
        check_name(request.name)
    if len(request.comment) > _COMMENT_LIMIT or not request.comment.isprintable():
        raise InvalidSpec(f"a comment is one line of at most {_COMMENT_LIMIT} characters")
    with host.lock(name):
        return take_locked(host, name, request, events)


def take_locked(host: Host, name: str, request: Take, events: Sink) -> Snapshot:
    """`take` while the caller holds the lock."""
    was = query.get(host, name).record
    instance = get_settled(host, name)
    finished = _find_finished(was, instance.record)
    if finished is not None and finished.purpose is request.purpose and request.name in (finished.name, ""):
        return finished
    record = instance.record
    if request.name and any(item.name == request.name for item in record.snapshots):
        raise AlreadyExists(
            f"{name!r} has a snapshot {request.name!r} already",
            hint=f"choose another name, or: hvctl snapshot delete {name} {request.name}",
        )
    _check_state(host, instance, request)
    how = _choose(host, instance)
    if how == GROW:
        layers.check_depth(host, record)
    _check_space(host, instance, how, request)
    return _take(host, instance, request, how, events)


def revert(
    host: Host, name: str, snapshot_name: str, *, force: bool = False, goal: Wait = Wait.SSH, events: Sink = ignore
) -> bool:
    """Put an instance back to one of its snapshots; what changed since is lost, other snapshots stay.

    One with memory goes on running, its clock set right. `force` ends a running one first, starts it again afterwards
    and waits for `goal`. Returns whether it runs now. Raises WrongState while it runs, NotFound, TimedOut.
    """
    host.require_root("snapshot revert")
    log_start = 0
    with host.lock(name):
        query.get(host, name)
        instance = get_settled(host, name)
        record, was_running = instance.record, instance.state in _ON
        snapshot = get_snapshot(record, snapshot_name)
        _check_mode(record, snapshot)
        memory = host.store.snapshot(record.uuid, snapshot.id) / "memory.save"
        is_live = snapshot.consistency is Consistency.MEMORY
        if instance.state not in _OFF and not (force and was_running):
            raise WrongState(
                f"cannot revert {name!r}: it is {instance.state}",
                hint=f"{effects.how_to_stop(instance)}; here and now: --force",
            )
        if is_live:
            wake.check(host, record, memory)
        target, image = _reverted(host, record, snapshot), layers.image_of(host, record)
        if was_running:
            effects.kill(host, record)
        _revert(host, record, target, image, events)
        if is_live:
            wake.restore(host, query.get(host, name).record, memory, events)
        elif was_running:
            log_start = lifecycle.start_locked(host, query.get(host, name).record, events)
    if was_running and not is_live:
        now = query.get(host, name)
        wait.wait_until(host, now, goal, timeout_s=wait.DEFAULT_TIMEOUT_S, events=events, log_start=log_start)
    return is_live or was_running


def delete(host: Host, name: str, snapshot_name: str, events: Sink = ignore) -> None:
    """Delete a snapshot. Layers that others stand on stay; from the first effect on it can only be finished.

    Raises NotFound.
    """
    host.require_root("snapshot delete")
    with host.lock(name):
        was = query.get(host, name).record
        instance = get_settled(host, name)
        is_same = was.pending is not None and was.pending.verb == FORGET.name
        if is_same and operation.arguments_of(was)["name"] == snapshot_name:
            return
        delete_locked(host, instance.record, get_snapshot(instance.record, snapshot_name), events)


def delete_locked(host: Host, record: Record, snapshot: Snapshot, events: Sink) -> None:
    """`delete` while the caller holds the lock."""
    pending = operation.intend(FORGET, snapshot=snapshot.id, name=snapshot.name, old=snapshot.layer)
    going = replace(snapeffects.without_snapshot(record, snapshot.id), pending=pending)
    with operation.begin(host, FORGET, going, claim_existing(host), events) as change:
        change.redo_after(operation.CLAIM)


def _check_mode(record: Record, snapshot: Snapshot) -> None:
    """Raise WrongState for a snapshot of what the instance was in the other mode."""
    if snapshot.mode is not record.mode:
        then, now = (get_backend(mode).noun for mode in (snapshot.mode, record.mode))
        raise WrongState(
            f"snapshot {snapshot.name!r} is of {record.name!r} as {then}, and it is {now} now",
            hint=f"hvctl convert {record.name} --to {snapshot.mode}, and try again; "
            f"or another one of it: hvctl copy {record.name}@{snapshot.name} NAME",
        )


def _find_finished(was: Record, now: Record) -> Snapshot | None:
    """The snapshot of an interrupted `take` that was finished just now."""
    if was.pending is None or was.pending.verb != TAKE.name:
        return None
    return snapeffects.find_by_id(now, operation.arguments_of(was)["snapshot"])


def _check_state(host: Host, instance: Instance, request: Take) -> None:
    name, record = instance.name, instance.record
    if instance.state not in (*_OFF, *_ON):
        raise WrongState(
            f"cannot take a snapshot of {name!r}: it is {instance.state}", hint=effects.how_to_stop(instance)
        )
    if not request.with_memory:
        return
    get_backend(record.mode).check_memory()
    if instance.state not in _ON:
        raise WrongState(f"{name!r} is off: there is no memory to keep", hint="leave --memory away")
    disks = get_backend(record.mode).layers.list_left_out(host, record)
    if disks:
        raise WrongState(
            f"{name!r} has data disks ({', '.join(disks)}), which a snapshot leaves out: its memory would not fit them",
            hint="leave --memory away",
        )


def _choose(host: Host, instance: Instance) -> str:
    """How its snapshot is taken."""
    mode_layers, record = get_backend(instance.record.mode).layers, instance.record
    if instance.state in _ON:
        return GROW if mode_layers.grows_while_running else ASIDE
    return NAME if mode_layers.is_untouched(host, record.layers[-1]) else GROW


def _check_space(host: Host, instance: Instance, how: str, request: Take) -> None:
    record = instance.record
    needed_bytes = get_backend(record.mode).layers.measure_running(host, record) if how == ASIDE else 0
    needed_bytes += instance.live.memory_bytes if request.with_memory else 0
    layers.check_space(host, needed_bytes, what=f"a snapshot of {record.name!r}")


def _take(host: Host, instance: Instance, request: Take, how: str, events: Sink) -> Snapshot:
    record, is_live = instance.record, instance.state in _ON
    backend, image = get_backend(record.mode), layers.image_of(host, record)
    cannot_freeze = backend.layers.find_freezer(host, record) if is_live and not request.with_memory else ""
    freeze = is_live and not request.with_memory and not cannot_freeze
    snapshot = _describe(record, request, how, _consistency(is_live, freeze, request))
    layer = {GROW: str(uuid4()), ASIDE: snapshot.layer, NAME: ""}[how]
    if cannot_freeze:
        events(Note(record.name, f"this snapshot is crash-consistent: {cannot_freeze}"))
    pending = operation.intend(
        TAKE,
        snapshot=snapshot.id,
        layer=layer,
        how=how,
        live="yes" if is_live and how == GROW else "no",
        # A container that somebody has paused stays so.
        freeze="yes" if freeze and instance.state is State.RUNNING else "no",
    )
    claimed = replace(snapeffects.with_snapshot(record, snapshot), pending=pending)
    with operation.begin(host, TAKE, claimed, claim_existing(host), events) as change:
        with change.step("files"):
            keep_files(host, change.record, image, snapshot)
        with change.step("layer"):
            if layer:
                parent = record.layers[-1] if how == GROW else "".join(record.layers[-2:-1])
                backend.layers.create(host, record, image, layer, parent)
        with contextlib.ExitStack() as held:
            _freeze(change, held, events)
            with change.step("fill"):
                if how == ASIDE:
                    backend.layers.fill(host, record, layer)
                    held.close()  # it goes on while the copy is brought to the disk
                    host.shell.call(files.sync_tree, host.store.layer(layer))
            _switch(change, image, request)
        change.record = TAKE.outcome(change.record) if TAKE.outcome else change.record
        change.redo_after("switch")
    return snapeffects.find_by_id(change.record, snapshot.id) or snapshot


def _consistency(is_live: bool, freeze: bool, request: Take) -> Consistency:
    if not is_live:
        return Consistency.STOPPED
    if request.with_memory:
        return Consistency.MEMORY
    return Consistency.FROZEN if freeze else Consistency.CRASH


def _describe(record: Record, request: Take, how: str, consistency: Consistency) -> Snapshot:
    now = datetime.datetime.now(datetime.UTC)
    name = request.name or _name_by_time(record, request.purpose, now)
    below = record.layers[-2] if len(record.layers) > 1 else ""
    return Snapshot(
        id=str(uuid4()),
        name=name,
        layer={GROW: record.layers[-1], ASIDE: str(uuid4()), NAME: below}[how],
        mode=record.mode,
        parent=record.current,
        taken_at=format_time(now),
        comment=request.comment,
        consistency=consistency,
        purpose=request.purpose,
    )


def _name_by_time(record: Record, purpose: Purpose, now: datetime.datetime) -> str:
    prefix = {Purpose.SCHEDULE: AUTOMATIC, Purpose.USER: "snap-"}.get(purpose, f"{purpose}-")
    name = first = f"{prefix}{now:%Y%m%d-%H%M%S}"
    number = 1
    while any(item.name == name for item in record.snapshots):
        number += 1
        name = f"{first}-{number}"
    return name


def keep_files(host: Host, record: Record, image: Image, snapshot: Snapshot) -> None:
    """The definition of this moment and what belongs to the state beside the root."""
    store, call = host.store, host.shell.call
    folder = store.snapshot(record.uuid, snapshot.id)
    call(files.make_directory, folder.parent, 0o700)
    call(files.make_directory, folder, 0o700)
    xml = domains.get_xml(effects.get_domain(host, record))
    before = replace(snapeffects.without_snapshot(record, snapshot.id), pending=None)
    call(files.write_file, folder / "domain.xml", metadata.embed(xml, before).encode(), 0o600)
    get_backend(record.mode).layers.keep_state(host, record, image, folder)


def _freeze(change: operation.Operation, held: contextlib.ExitStack, events: Sink) -> None:
    """Hold it still until `held` ends, whatever happens; go on without where its agent says that it cannot."""
    host, record = change.host, change.record
    backend = get_backend(record.mode)
    with change.step("freeze"):
        if operation.arguments_of(record)["freeze"] != "yes":
            return
        held.callback(backend.layers.thaw, host, record)
        try:
            backend.layers.freeze(host, record)
        except GuestFailed as error:
            backend.layers.thaw(host, record)
            events(Note(record.name, f"this snapshot is crash-consistent: {error.message}"))
            identifier = operation.arguments_of(record)["snapshot"]
            change.record = snapeffects.mark(change.record, identifier, Consistency.CRASH)


def _switch(change: operation.Operation, image: Image, request: Take) -> None:
    """The commit: of what is off by its definition, of a running VM by libvirt's call, else by the record alone."""
    host, record = change.host, change.record
    arguments, backend = operation.arguments_of(record), get_backend(record.mode)
    if arguments["how"] == GROW and arguments["live"] != "yes":
        after = snapeffects.taken(record)
        xml = domains.get_xml(change.domain)
        change.commit("switch", backend.layers.restack(host, after, image, xml), after)
        return
    with change.step("switch"):
        if arguments["live"] == "yes":
            folder = host.store.snapshot(record.uuid, arguments["snapshot"])
            memory = folder / "memory.save" if request.with_memory else None
            backend.layers.switch(host, record, arguments["layer"], memory)


def _reverted(host: Host, record: Record, snapshot: Snapshot) -> Record:
    """The record as it is after the revert: sizes, template and kernel of then; name, address and disks of now."""
    then = metadata.find(host.read_text(host.store.snapshot(record.uuid, snapshot.id) / "domain.xml"))
    if then is None:
        raise NotFound(
            f"snapshot {snapshot.name!r} has lost its definition",
            hint=f"hvctl snapshot delete {record.name} {snapshot.name}",
        )
    if bool(then.first_id) != bool(record.first_id):
        raise WrongState(
            f"{record.name!r} was privileged at snapshot {snapshot.name!r}, and is not now",
            hint=f"make another one of it: hvctl copy {record.name}@{snapshot.name} NAME",
        )
    layer = str(uuid4())
    # All of them, not the top alone: one that another instance's compaction made part of the next is found by its name only.
    pending = operation.intend(REVERT, snapshot=snapshot.id, layer=layer, old=",".join(record.layers))
    return replace(
        record,
        spec=replace(then.spec, name=record.name, autostart=record.spec.autostart, mounts=record.spec.mounts),
        layers=(*layers.stack_of(host, snapshot.layer), layer),
        kernel_release=then.kernel_release,
        accelerator=then.accelerator,
        current=snapshot.id,
        pending=pending,
    )


def _revert(host: Host, record: Record, target: Record, image: Image, events: Sink) -> None:
    backend, snapshot_id = get_backend(record.mode), operation.arguments_of(target)["snapshot"]
    folder = host.store.snapshot(record.uuid, snapshot_id)
    now = domains.get_xml(effects.get_domain(host, record))
    xml = _definition_of(host.read_text(folder / "domain.xml"), now)
    claimed = replace(record, pending=target.pending)
    with operation.begin(host, REVERT, claimed, claim_existing(host), events) as change:
        with change.step("layer"):
            below = target.layers[-2] if len(target.layers) > 1 else ""
            backend.layers.create(host, target, image, target.layers[-1], below)
        with change.step("state"):
            backend.layers.take_state(host, record, target, image, folder)
        change.commit("define", backend.layers.restack(host, target, image, xml), target)
        change.redo_after("define")


def _definition_of(then: str, now: str) -> str:
    """The definition of then under the name of now, with the disks and directories that it has now: those are not reverted."""
    old, new = ElementTree.fromstring(then), ElementTree.fromstring(now)
    old_name, devices, present = old.find("name"), old.find("devices"), new.find("devices")
    assert old_name is not None and devices is not None and present is not None
    old_name.text = new.findtext("name")
    for tag in ("disk", "filesystem"):
        for element in devices.findall(tag):
            devices.remove(element)
        for element in reversed(present.findall(tag)):
            devices.insert(1 if devices.find("emulator") is not None else 0, element)
    return ElementTree.tostring(old, encoding="unicode")
