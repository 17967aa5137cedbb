"""Changing what an instance is: its name, CPUs, memory, autostart, kernel."""

from __future__ import annotations

import logging
from dataclasses import replace
from xml.etree import ElementTree

from hvctl import identity, operation
from hvctl.backends import get_backend
from hvctl.errors import AlreadyExists, HvctlError, UsageError, WrongState
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.instances import effects, query, schedule
from hvctl.instances.claim import claim_existing
from hvctl.instances.recovery import get_settled
from hvctl.instances.verbs import RENAME, SET
from hvctl.libvirtapi import domains
from hvctl.model import Instance, Mode, Record, Spec, State
from hvctl.values import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What `set` is asked to change; None leaves it."""

    cpus: int | None = None
    memory_bytes: int | None = None
    is_autostart: bool | None = None
    keep: tuple[tuple[str, int], ...] | None = None
    """A schedule for its snapshots (`schedule.parse_keep`); empty: none."""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """One field that was changed: its name, new value, and whether that holds now or from the next start."""

    field: str
    value: str
    is_live: bool


def rename(host: Host, old: str, new: str, events: Sink = ignore) -> Instance:
    """Give a stopped instance another name: libvirt, DNS and the guest's host name follow, files stay where they are.

    Raises WrongState while it runs, AlreadyExists for a taken name.
    """
    host.require_root("rename")
    identity.check_name(new)
    if new == old:
        raise UsageError(f"{old!r} is already its name", hint=f"hvctl rename {old} NEW")
    with host.lock(old), host.lock(new):
        renamed = _find_renamed(host, old, new)
        if renamed is not None:
            return renamed
        instance = get_settled(host, old)
        if instance.state not in (State.STOPPED, State.CRASHED):
            raise WrongState(f"cannot rename {old!r}: it is {instance.state}", hint=effects.how_to_stop(instance))
        if instance.record.spec.is_ephemeral:
            raise WrongState(f"{old!r} belongs to a `run` and goes with it", hint="to keep one: hvctl create")
        if _is_taken(host, new):
            raise AlreadyExists(f"there is already an instance {new!r}", hint="choose another name")
        record = replace(instance.record, pending=operation.intend(RENAME, **{"from": old, "to": new}))
        with operation.begin(host, RENAME, record, claim_existing(host), events) as change:
            with change.step("address"):
                effects.name_address(host, record, new)
            with change.step("rename"):
                get_backend(record.mode).rename(host, change.record, new)
            change.record = replace(change.record, spec=replace(change.record.spec, name=new))
            change.redo_after("rename")
        return query.get(host, new)


def set_(host: Host, name: str, changes: Changes, events: Sink = ignore) -> tuple[Changed, ...]:
    """Change what was asked, in the definition and, where the running guest can follow, at once.

    Raises InvalidSpec for an impossible value, before anything is changed.
    """
    host.require_root("set")
    with host.lock(name):
        instance = get_settled(host, name)
        spec = instance.record.spec
        spec = replace(
            spec,
            cpus=changes.cpus or spec.cpus,
            memory_bytes=changes.memory_bytes or spec.memory_bytes,
            autostart=spec.autostart if changes.is_autostart is None else changes.is_autostart,
        )
        record = instance.record
        get_backend(record.mode).check_size(spec)
        xml = _resize(host, record, spec)
        with operation.begin(host, SET, record, claim_existing(host), events) as change:
            keep = change.record.keep if changes.keep is None else changes.keep
            change.commit("define", xml, replace(change.record, spec=spec, keep=keep))
            change.redo_after("define")
        return _report(host, instance, replace(record, spec=spec), changes)


def _resize(host: Host, record: Record, spec: Spec) -> str:
    """Its definition with other sizes."""
    xml = domains.get_xml(domains.get(host.connection(record.mode), record.uuid))
    domain = ElementTree.fromstring(xml)
    get_backend(record.mode).resize_xml(domain, spec)
    return ElementTree.tostring(domain, encoding="unicode")


def _report(host: Host, before: Instance, record: Record, changes: Changes) -> tuple[Changed, ...]:
    """Try each change on the running guest; what it cannot follow waits for the next start."""
    done = []
    is_off = before.state in (State.STOPPED, State.CRASHED)
    for field, value, shown in (
        ("cpus", changes.cpus, str(changes.cpus)),
        ("memory", changes.memory_bytes, f"{changes.memory_bytes} bytes"),
    ):
        if value is not None:
            done.append(Changed(field=field, value=shown, is_live=is_off or _try_live(host, record, field)))
    if changes.is_autostart is not None:
        done.append(Changed(field="autostart", value="on" if changes.is_autostart else "off", is_live=True))
    if changes.keep is not None:
        done.append(Changed(field="keep", value=schedule.format_keep(changes.keep), is_live=True))
    return tuple(done)


def _try_live(host: Host, record: Record, field: str) -> bool:
    try:
        get_backend(record.mode).resize_live(host, record, field)
    except HvctlError as error:
        log.debug("%s of %s cannot change now: %s", field, record.name, error.message)
        return False
    return True


def _find_renamed(host: Host, old: str, new: str) -> Instance | None:
    """The instance, finished, when this very renaming was interrupted after libvirt knew the new name."""
    instance = query.find(host, new)
    if instance is None or operation.arguments_of(instance.record) != {"from": old, "to": new}:
        return None
    return get_settled(host, new)


def _is_taken(host: Host, name: str) -> bool:
    return any(domains.find(host.connection(mode), name) is not None for mode in Mode)
