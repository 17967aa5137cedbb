"""Claiming an instance: the first intent of a change of one that is there, and the lock of a `run`."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from hvctl import operation
from hvctl.host import Host
from hvctl.instances import effects
from hvctl.model import Record


def run_lock(name: str) -> str:
    """The lock that a `run` holds while it lives, beside the instance's own. No instance can have this name: the dot."""
    return f"run.{name}"


def backup_lock(uuid: UUID) -> str:
    """The lock that a backup of an instance holds until it has let go of the snapshot that it reads."""
    return f"backup.{uuid}"


def claim_existing(host: Host) -> Callable[[Record], object]:
    """What `operation.begin` takes as a claim for a change of an existing instance."""

    def claim(record: Record) -> object:
        domain = effects.get_domain(host, record)
        operation.write_record(host, domain, record)
        return domain

    return claim
