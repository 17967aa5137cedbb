"""Changing an instance's mode: the same name, address, MAC, keys, files and snapshots, as a VM or as a container.

It keeps its UUID. What it was stays whole, off and defined, until what it becomes has answered; on any failure before
that it is what it was, and runs again if it ran. Where nothing is started, nothing can answer: then what it was is kept
as a snapshot, as with `keep_source`.
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from uuid import uuid4

from hvctl import operation, templates
from hvctl.backends import Backend, Secrets, get_backend
from hvctl.errors import AlreadyExists, GuestFailed, HvctlError, InvalidSpec, TimedOut, Unsupported, WrongState
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.instances import converteffects, create, effects, layers, lifecycle, query, snapshots, wait
from hvctl.instances.claim import claim_existing, define_stub
from hvctl.instances.recovery import get_settled
from hvctl.instances.verbs import CONVERT
from hvctl.libvirtapi import domains
from hvctl.model import Consistency, DiskKind, Image, Instance, Mode, Record, Snapshot, State, Wait
from hvctl.rootfs import building
from hvctl.units import format_time
from hvctl.values import dataclass

_OFF = (State.STOPPED, State.CRASHED)
_DEFAULT_TEMPLATE = "default"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `convert` is asked for."""

    name: str
    mode: Mode
    keep_source: bool = False
    """Whether what it was stays as a snapshot even though what it is now has answered."""
    start: bool = True
    """Whether one that ran is to run again, and must answer."""
    timeout_s: float = wait.DEFAULT_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What has come of it."""

    instance: Instance
    is_changed: bool
    """False when it was of that mode already."""
    kept: str = ""
    """The name of the snapshot that has it as it was; empty: nothing of that is left."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    source: Record
    """As it is, with the intent."""
    record: Record
    """As it is to be; what only its root can tell is missing."""
    image: Image
    secrets: Secrets
    kept: Snapshot | None
    is_running: bool
    starts: bool
    timeout_s: float

    @property
    def backend(self) -> Backend:
        return get_backend(self.record.mode)


def list_losses(host: Host, name: str, mode: Mode) -> tuple[str, ...]:
    """What of an instance the other mode cannot have, each a clause; nothing for one that is of that mode already.

    Raises NotFound, Unsupported or WrongState for one that cannot be converted at all.
    """
    record = query.get(host, name).record
    if record.mode is mode:
        return ()
    _check_kind(record)
    lost = get_backend(record.mode).conversion.list_losses(host, record)
    for disk in record.disks:
        kept = "stays in the store, unattached" if disk.kind is DiskKind.VOLUME else "is not ours"
        lost.append(f"the data disk {disk.name} ({kept})")
    if record.spec.template != _DEFAULT_TEMPLATE or record.spec.variables:
        lost.append(f"the template {record.spec.template} and its variables: it gets the one of its new mode")
    return tuple(lost)


def convert(host: Host, request: Request, events: Sink = ignore) -> Outcome:
    """Change an instance's mode; one that runs is shut down, and started as what it becomes.

    Raises NotFound, WrongState, Unsupported, InvalidSpec, HostError without space, TimedOut or GuestFailed when it does
    not answer; it is what it was then, and runs if it ran.
    """
    host.require_root("convert")
    with host.lock(request.name):
        was = query.get(host, request.name).record
        instance = get_settled(host, request.name)
        if instance.record.mode is request.mode:
            return Outcome(instance=instance, is_changed=False, kept=_find_kept(was))
        plan = _make_plan(host, request, instance, events)
        try:
            _convert(host, plan, events)
        except HvctlError as error:
            _say_what_it_is(host, plan, error)
            raise
    kept = plan.kept.name if plan.kept else ""
    return Outcome(instance=query.get(host, request.name), is_changed=True, kept=kept)


def _check_kind(record: Record) -> None:
    query.check_is_system(
        record, hint=f"make another: hvctl create NAME --image {record.spec.image} --vm, or --container"
    )
    if record.spec.is_ephemeral:
        raise WrongState(f"{record.name!r} belongs to a `run` and goes with it", hint="to keep one: hvctl create")
    if not record.network:
        raise Unsupported(
            f"{record.name!r} is on this host's network and has no address to keep", hint="make another: hvctl create"
        )


def _find_kept(was: Record) -> str:
    """The snapshot that an interrupted conversion, finished just now, has kept it as."""
    if was.pending is None or was.pending.verb != CONVERT.name:
        return ""
    identifier = operation.arguments_of(was)["snapshot"]
    return next((item.name for item in was.snapshots if item.id == identifier), "")


def _make_plan(host: Host, request: Request, instance: Instance, events: Sink) -> _Plan:
    """Everything checked; nothing is changed but that the image may get its other half."""
    record, backend = instance.record, get_backend(request.mode)
    _check_kind(record)
    if instance.state not in (State.RUNNING, *_OFF):
        raise WrongState(f"cannot convert {record.name!r}: it is {instance.state}", hint=effects.how_to_stop(instance))
    if domains.find(host.connection(request.mode), record.name) is not None:
        raise AlreadyExists(
            f"there is {backend.noun} {record.name!r} already, beside this one",
            hint=f"rename this one first: hvctl rename {record.name} NAME",
        )
    image = backend.complete_image(host, layers.image_of(host, record), events)
    backend.check_image(image)
    is_running = instance.state is State.RUNNING
    starts = is_running and request.start
    kept = _describe_kept(record) if request.keep_source or not starts else None
    target, note = backend.plan(host, _make_target(record, backend, kept), image, require_kvm=False)
    needed_bytes = backend.conversion.measure(host, record, image)
    layers.check_space(host, needed_bytes, what=f"converting {record.name!r}")
    if note:
        events(Note(record.name, note))
    pending = operation.intend(
        CONVERT,
        to=target.mode,
        base=target.layers[0],
        top=target.layers[1],
        old=",".join(record.layers),
        snapshot=kept.id if kept else "",
        ran="yes" if is_running else "no",
        keep="yes",  # its volumes
    )
    return _Plan(
        source=replace(record, pending=pending),
        record=target,
        image=image,
        secrets=converteffects.read_secrets(host, record),
        kept=kept,
        is_running=is_running,
        starts=starts,
        timeout_s=request.timeout_s,
    )


def _make_target(record: Record, backend: Backend, kept: Snapshot | None) -> Record:
    """The record as it is to be: what is named here changes, all else is the instance's."""
    spec = replace(backend.conversion.adopt(record.spec), template=_DEFAULT_TEMPLATE)
    try:
        backend.check_size(spec)
    except InvalidSpec as error:
        error.hint = f"first: hvctl set {record.name} {error.hint}"
        raise
    return replace(
        record,
        spec=spec,
        layers=(str(uuid4()), str(uuid4())),
        first_id=None,
        accelerator=None,
        kernel_release="",
        disks=(),
        snapshots=(*record.snapshots, *((kept,) if kept else ())),
        current=kept.id if kept else record.current,
    )


def _describe_kept(record: Record) -> Snapshot:
    now = datetime.datetime.now(datetime.UTC)
    return Snapshot(
        id=str(uuid4()),
        name=f"{record.mode}-{now:%Y%m%d-%H%M%S}",
        layer=record.layers[-1],
        mode=record.mode,
        parent=record.current,
        taken_at=format_time(now),
        comment="as it was before it was converted",
        consistency=Consistency.STOPPED,
    )


def _say_what_it_is(host: Host, plan: _Plan, error: HvctlError) -> None:
    """Add to a failure that took everything back what there is now."""
    if query.get(host, plan.record.name).record.pending is None:
        again = ", and was started again" if plan.is_running else ""
        now = f"it is {get_backend(plan.source.mode).noun} as before{again}"
        error.hint = "; ".join(filter(None, (now, error.hint)))


def _convert(host: Host, plan: _Plan, events: Sink) -> None:
    backend, connection = plan.backend, host.connection(plan.record.mode)
    with operation.begin(host, CONVERT, plan.source, claim_existing(host), events) as change:
        with change.step("stop"):
            if plan.is_running:
                events(Note(plan.record.name, "shutting it down"))
                lifecycle.stop_locked(host, query.get(host, plan.record.name), events=events)
        with change.step("name"), backend.allocate(host, plan.record) as record:
            define_stub(host, record)
        with change.step("keep"):
            if plan.kept is not None:
                image = layers.image_of(host, plan.source)
                snapshots.keep_files(host, plan.source, image, plan.kept)
        with change.step("files"):
            backend.dress(host, record, plan.secrets)
        with change.step("root"):
            record, image = _make_root(host, plan, record, events)
        with change.step("define"):
            template = templates.get_template(record.mode, record.spec.template, host.config.template_folders)
            made = create.Plan(record=record, image=image, template=template, secrets=plan.secrets, note="")
            domains.define(connection, create.format_xml(host, made))
        with change.step("answer"):
            if plan.starts:
                _start(host, plan, record, events)
        # What is left from here on speaks of what the instance has now.
        left = replace(change.record, layers=record.layers, snapshots=record.snapshots, current=record.current)
        with change.step("shed", left):
            converteffects.shed(host, left)
        change.redo_after("shed")


def _make_root(host: Host, plan: _Plan, record: Record, events: Sink) -> tuple[Record, Image]:
    """Its two layers: what it was, and an empty one to write to."""
    backend, (base, top) = plan.backend, record.layers
    with building.begin(host, record.name, events) as work:
        taken = backend.conversion.take_root(work, plan.source, record, plan.image)
        if taken.left_behind and plan.kept is None:
            raise Unsupported(
                f"{record.name!r} has more than its root on its disk, which would be lost: {taken.left_behind}",
                hint=f"keep what it was: hvctl convert {record.name} --to {record.mode} --keep-source",
            )
        work.tell("done", 100)
    backend.layers.create(host, taken.record, taken.image, top, base)
    backend.add_seed(host, taken.record, replace(plan.secrets, user_data=taken.user_data))
    return taken.record, taken.image


def _start(host: Host, plan: _Plan, record: Record, events: Sink) -> None:
    domain = domains.get(host.connection(record.mode), record.uuid)
    instance = Instance(record=record, live=domains.describe(domain).live)
    log_start = lifecycle.start_locked(host, instance.record, events)
    try:
        wait.wait_until(host, instance, Wait.SSH, timeout_s=plan.timeout_s, events=events, log_start=log_start)
    except (TimedOut, GuestFailed) as error:
        error.hint = ""  # it is about one that is there for somebody to look at
        raise
