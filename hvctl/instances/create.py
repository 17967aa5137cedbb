"""Making an instance from an image: plan and check everything, then do it step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import field, replace
from uuid import uuid4
from xml.etree import ElementTree

from hvctl import identity, metadata, operation, templates
from hvctl.access import keys
from hvctl.backends import Secrets, get_backend
from hvctl.errors import AlreadyExists, InvalidSpec
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import lifecycle, query, wait
from hvctl.instances.claim import claim_new
from hvctl.instances.recovery import settle
from hvctl.instances.verbs import CREATE
from hvctl.libvirtapi import networks
from hvctl.model import Image, Instance, Provision, Record, Spec, Wait
from hvctl.rootfs import application, published
from hvctl.rootfs.application import Wishes
from hvctl.units import now
from hvctl.values import dataclass

_USER_DATA_LIMIT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `create` is asked for beyond the spec."""

    spec: Spec
    authorized_keys: tuple[str, ...] = ()
    """Public key lines that may log in; checked by `identity.check_public_key`."""
    user_data: bytes = field(default=b"", repr=False)
    wishes: Wishes = field(default=Wishes(), repr=False)
    """Of an application: what it is to run otherwise than the image says."""
    require_kvm: bool = False
    trust_image: bool = False
    """Whether this host's kernel may read the file systems of the image, where hvctl cannot."""
    start: bool = True
    wait: Wait = Wait.SSH
    timeout_s: float = 180.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request that was checked: everything that is needed to do it."""

    record: Record
    image: Image
    template: templates.Template
    secrets: Secrets
    note: str
    """What was chosen for the user, in a line; empty when there was no choice."""


def create(host: Host, request: Request, events: Sink = ignore) -> Instance:
    """Make an instance and, unless told otherwise, start it and wait until it answers.

    Raises AlreadyExists for a taken name, NotFound for an unknown image or template, InvalidSpec, HostError, TimedOut,
    Interrupted when somebody stops the waiting for one that stays.
    Until it is complete a failure leaves nothing; after that (a start that fails) it leaves a stopped instance.
    """
    host.require_root("create")
    take_key = keys.begin_pair()
    host.connect_ahead()
    backend, name = get_backend(request.spec.mode), request.spec.name
    image = published.get_image(host, request.spec.image)
    image = backend.complete_image(host, image, events, is_trusted=request.trust_image)
    plan = plan_new(host, request, image, take_key)
    with host.lock(name):
        for note in filter(None, (plan.note, _describe_access(plan.record))):
            events(Note(name, note))
        record = _adopt(host, plan) or _build(host, plan, events)
        log_start = lifecycle.start_locked(host, record, events) if request.start else 0
    instance = query.refresh(host, record)
    if request.start:
        goal, timeout_s = request.wait, request.timeout_s
        with contextlib.nullcontext() if record.spec.is_ephemeral else wait.for_what_stays(name):
            wait.wait_until(host, instance, goal, timeout_s=timeout_s, events=events, log_start=log_start)
    return instance


def plan_new(
    host: Host, request: Request, image: Image | None = None, take_key: Callable[[], identity.KeyPair] = keys.new_pair
) -> Plan:
    """As `make_plan`, of what somebody has just typed: raises InvalidSpec for variables that its template has no use for."""
    plan = make_plan(host, request, image, take_key)
    templates.check_variables(plan.template, dict(request.spec.variables))
    return plan


def make_plan(
    host: Host, request: Request, image: Image | None = None, take_key: Callable[[], identity.KeyPair] = keys.new_pair
) -> Plan:
    """Check a request against image (where given, else the one it names), template and host. Changes nothing.

    `take_key`: gives the ssh host key, where one was begun before (`keys.begin_pair`).
    """
    identity.check_name(request.spec.name)
    backend = get_backend(request.spec.mode)
    image = image or published.get_image(host, request.spec.image)
    spec = replace(request.spec, template=request.spec.template or backend.choose_template(image))
    template = templates.get_template(spec.mode, spec.template, host.config.template_folders)
    _check_user_data(request.user_data)
    key = take_key()
    uuid = uuid4()
    record = Record(
        uuid=uuid,
        spec=spec,
        store=host.store.root,
        image_id=image.id,
        layers=(str(uuid4()),),
        network=host.config.network,
        mac=identity.new_mac(),
        login_user=image.login_user,
        host_key=key.public,
        authorized_keys=() if image.process is not None else request.authorized_keys,
        provision=image.provision,
        created_at=now(),
    )
    backend.check(host, record, image)
    record, note = backend.plan(host, record, image, require_kvm=request.require_kvm)
    secrets = _make_secrets(host, request, image, key.private)
    plan = Plan(record=record, image=image, template=template, secrets=secrets, note=note)
    xml = format_xml(host, plan)  # a template that cannot be rendered is found before anything is made
    _check_kind(xml, plan)
    if (
        ElementTree.fromstring(xml).find("devices/interface") is None
    ):  # on no network of ours: there is nothing to reserve
        plan = replace(plan, record=replace(record, network=""))
    return plan


def format_xml(host: Host, plan: Plan, record: Record | None = None) -> str:
    """The domain's XML as it would be defined, record included."""
    record = record or plan.record
    backend = get_backend(record.mode)
    values = backend.format_values(host, record, plan.image)
    xml = templates.render(plan.template, values, dict(record.spec.variables))
    return metadata.embed(backend.finish_xml(host, record, plan.image, xml), record)


def _describe_access(record: Record) -> str:
    """What is missed of an image that learns nothing from us; empty for others."""
    if record.is_application or record.provision is not Provision.NONE:
        return ""
    return f"its image has no cloud-init, so it gets no keys and no name: enter it by hvctl exec {record.name}"


def _check_kind(xml: str, plan: Plan) -> None:
    """Raise InvalidSpec for a template of a whole system with an application, or the other way round."""
    needs, has = plan.image.process is not None, "hvctl/application" in xml
    if needs != has:
        kinds = {True: "an application", False: "a whole system"}
        raise InvalidSpec(
            f"template {plan.template.name!r} is for {kinds[has]}, and image {plan.image.name!r} is {kinds[needs]}",
            hint="leave --template away, or see: hvctl template list",
        )


def _make_secrets(host: Host, request: Request, image: Image, host_key: bytes) -> Secrets:
    """What it gets that stands in no record. Raises InvalidSpec for what this image has no use for."""
    if image.process is None:
        if request.wishes.are_any:
            raise InvalidSpec(
                f"image {image.name!r} is a whole system: it has no command of its own",
                hint="leave --env, --entrypoint, --user and the command away; run it later: hvctl exec",
            )
        return Secrets(host_key=host_key, user_data=request.user_data)
    if request.user_data:
        raise InvalidSpec(f"image {image.name!r} has no cloud-init for user data", hint="leave --user-data away")
    application.check_programs(host)
    process = application.resolve(image, request.wishes)
    ids = application.find_ids(host, image, process)
    return Secrets(host_key=host_key, process=process, process_ids=ids, has_terminal=bool(request.wishes.terminal))


def _check_user_data(user_data: bytes) -> None:
    if len(user_data) > _USER_DATA_LIMIT_BYTES:
        raise InvalidSpec("the user data is larger than 16 MiB", hint="let it fetch what is large")
    if user_data and not user_data.startswith((b"#", b"Content-Type:", b"MIME-Version:", b"\x1f\x8b")):
        raise InvalidSpec(
            "the user data is nothing that cloud-init knows", hint="let it begin with '#cloud-config' or '#!/bin/sh'"
        )


def _adopt(host: Host, plan: Plan) -> Record | None:
    """The record of an interrupted `create` of the same spec that had come so far that it was finished now, or None.

    Anything else that was interrupted under this name is undone or finished first. Raises AlreadyExists.
    """
    name = plan.record.name
    existing = query.find(host, name)
    if existing is not None and existing.record.pending is not None:
        query.check_has_name(existing, name)
        was = existing.record
        done = settle(host, was)
        existing = query.find(host, name)
        if existing is not None and done == f"finished {CREATE.name}" and was.spec == plan.record.spec:
            return existing.record
    if existing is not None:
        raise AlreadyExists(
            f"there is already an instance {name!r} ({existing.state})",
            hint=f"choose another name, or: hvctl delete {name}",
        )
    return None


def _build(host: Host, plan: Plan, events: Sink) -> Record:
    backend = get_backend(plan.record.mode)
    with operation.begin(host, CREATE, plan.record, claim_new(host), events) as change:
        with backend.allocate(host, change.record) as allocated, change.step("address", allocated):
            pass  # it stands in libvirt now: the next one may choose
        change.record = replace(change.record, address=reserve(host, change.record))
        with change.step("files"):
            backend.create_files(host, change.record, plan.image, plan.secrets)
        with change.step("root"):
            backend.create_root(host, change.record, plan.image, plan.secrets)
        # libvirt's schema has nothing to say of our own templates, as long as nothing of the user's is put into them.
        is_ours = plan.template.is_builtin and not change.record.spec.variables
        change.commit("define", format_xml(host, plan, change.record), is_ours=is_ours)
        change.redo_after("define")
    return change.record


def reserve(host: Host, record: Record, wanted: str = "") -> str:
    """Its address, kept from now on, the one that is wanted where that is free; empty without a network."""
    if not record.network:
        return ""
    call, last = host.shell.call, host.store.last_address
    with host.lock(f"network-{record.network}", timeout_s=30):
        after = host.read_text(last).strip() if call(files.exists, last) else ""
        connection, network = host.connection(record.mode), record.network
        if wanted and not networks.is_free(connection, network, wanted):
            wanted = ""
        address = networks.reserve(
            connection,
            network,
            name=record.name,
            mac=record.mac,
            address=wanted,
            after=after,
            asks_for_lease=not record.is_application,
        )
        call(files.write_file, last, f"{address}\n".encode(), 0o644)
    return address
