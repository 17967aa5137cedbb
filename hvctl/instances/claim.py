"""Claiming an instance that is there: the first intent of a change goes into its record."""

from __future__ import annotations

from collections.abc import Callable

from hvctl import operation
from hvctl.host import Host
from hvctl.instances import effects
from hvctl.model import Record


def claim_existing(host: Host) -> Callable[[Record], object]:
    """What `operation.begin` takes as a claim for a change of an existing instance."""

    def claim(record: Record) -> object:
        domain = effects.get_domain(host, record)
        operation.write_record(host, domain, record)
        return domain

    return claim
