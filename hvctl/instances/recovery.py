"""Finishing or undoing what a crash left, and bringing back what libvirt has forgotten."""

from __future__ import annotations

from hvctl import operation
from hvctl.errors import AlreadyExists, HvctlError, NotFound, Unsupported
from hvctl.host import Host
from hvctl.instances import effects, query
from hvctl.instances.lost import list_lost
from hvctl.instances.verbs import VERBS
from hvctl.libvirtapi import domains
from hvctl.model import Instance, Mode, Record

__all__ = ["get_settled", "list_lost", "recover", "settle"]


def settle(host: Host, record: Record) -> str:
    """Finish or undo the pending change of one record; the caller holds its lock. Says what it did: `undid create`.

    Raises Unsupported for a verb that this version does not know.
    """
    assert record.pending is not None
    verb = VERBS.get(record.pending.verb)
    if verb is None or record.pending.step not in verb.step_names():
        raise Unsupported(
            f"{record.name!r} is in the middle of {record.pending.verb!r}, which this hvctl does not know",
            hint="use the hvctl that began it",
        )
    effects.discard_unwritten(host, record)
    if verb.is_committed(host, record):
        operation.roll_forward(host, verb, record)
        return f"finished {verb.name}"
    operation.roll_back(host, verb, record)
    return f"undid {verb.name}"


def get_settled(host: Host, name: str) -> Instance:
    """The instance of this name, after finishing or undoing what was interrupted on it; the caller holds its lock.

    Raises NotFound, also when settling it took it away.
    """
    instance = query.get(host, name)
    query.check_has_name(instance, name)
    if instance.record.pending is not None:
        settle(host, instance.record)
        instance = query.get(host, name)
    return instance


def recover(host: Host, name: str) -> Record:
    """Define an instance again from its copy in the store, with its data, keys and address.

    Raises NotFound when the store has no such copy, AlreadyExists when the name is in use.
    """
    host.require_root("recover")
    with host.lock(name):
        record = next((record for record in list_lost(host) if record.name == name), None)
        if record is None:
            raise NotFound(f"the store has no lost instance {name!r}", hint="see which it has: hvctl host recover")
        for mode in Mode:
            if domains.find(host.connection(mode), name) is not None:
                raise AlreadyExists(
                    f"there is already a domain {name!r}", hint=f"rename that one first: hvctl rename {name}"
                )
        connection = host.connection(record.mode)
        effects.keep_address(host, record)
        xml = host.read_text(host.store.definition(record.uuid))
        try:
            domains.define(connection, xml)
        except HvctlError:
            effects.release_address(host, record)
            raise
        return record
