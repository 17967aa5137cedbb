"""Claiming an instance: the first intent of its making, or of a change of one that is there, and the lock of a `run`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from uuid import UUID

from hvctl import metadata, operation
from hvctl.backends import get_backend
from hvctl.host import Host
from hvctl.instances import effects
from hvctl.libvirtapi import domains
from hvctl.model import Record


def run_lock(name: str) -> str:
    """The lock that a `run` holds while it lives, beside the instance's own. No instance can have this name: the dot."""
    return f"run.{name}"


def backup_lock(uuid: UUID) -> str:
    """The lock that a backup of an instance holds until it has let go of the snapshot that it reads."""
    return f"backup.{uuid}"


def claim_new(host: Host) -> Callable[[Record], Any]:
    """What `operation.begin` takes as a claim for an instance that is being made."""
    return functools.partial(define_stub, host)


def define_stub(host: Host, record: Record) -> Any:
    """A domain that has this record and cannot be started. Returns libvirt's object."""
    xml = metadata.embed(get_backend(record.mode).format_stub(record), record)
    return domains.define(host.connection(record.mode), xml, is_ours=True)


def claim_existing(host: Host) -> Callable[[Record], object]:
    """What `operation.begin` takes as a claim for a change of an existing instance."""

    def claim(record: Record) -> object:
        domain = effects.get_domain(host, record)
        operation.write_record(host, domain, record)
        return domain

    return claim
