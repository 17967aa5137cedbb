"""Bringing a reverted VM back into the running moment that was kept."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

from hvctl import metadata
from hvctl.access import agent
from hvctl.backends import get_backend
from hvctl.errors import HvctlError, WrongState
from hvctl.events import Note, Sink, StepStarted
from hvctl.host import Host
from hvctl.instances import effects, layers
from hvctl.libvirtapi import domains, livedisks, networks
from hvctl.model import Record

_CLOCK_TIMEOUT_S = 20


def check(host: Host, record: Record, memory: Path) -> None:
    """Raise WrongState when its memory cannot be brought back into what it is called now, or into the disks it has now."""
    saved = ElementTree.fromstring(livedisks.get_saved_xml(host.connection(record.mode), memory))
    if saved.findtext("name") != record.name:
        was = saved.findtext("name", "")
        raise WrongState(
            f"its memory knows {record.name!r} as {was!r} and cannot be brought back under another name",
            hint=f"hvctl rename {record.name} {was}",
        )
    now = ElementTree.fromstring(domains.get_xml(effects.get_domain(host, record)))
    if _targets(saved) != _targets(now):
        raise WrongState(
            f"the memory of {record.name!r} was kept with the disks {' '.join(sorted(_targets(saved)))}, "
            f"and now it has {' '.join(sorted(_targets(now)))}",
            hint="give it the same disks: hvctl disk --help",
        )


def restore(host: Host, record: Record, memory: Path, events: Sink) -> None:
    """Let it go on in the moment that was kept, and set its clock right. On a failure it is reverted, and off."""
    connection = host.connection(record.mode)
    events(StepStarted(record.name, "snapshot-revert", "memory"))
    if record.network:
        networks.ensure_active(connection, record.network)
    xml = livedisks.get_saved_xml(connection, memory)
    xml = get_backend(record.mode).layers.restack(host, record, layers.image_of(host, record), xml)
    xml = metadata.embed(xml, record)
    try:
        livedisks.restore(connection, memory, xml)
    except HvctlError as error:
        error.hint = f"its disk is reverted; it can be started without the memory: hvctl start {record.name}"
        raise
    _set_clock(host, record, events)


def _targets(domain: ElementTree.Element) -> set[str]:
    return {target.get("dev", "") for target in domain.iterfind("devices/disk/target")}


def _set_clock(host: Host, record: Record, events: Sink) -> None:
    domain, deadline_s = effects.get_domain(host, record), time.monotonic() + _CLOCK_TIMEOUT_S
    while True:
        try:
            agent.set_clock(domain, time.time_ns())
            return
        except HvctlError as error:
            if time.monotonic() > deadline_s:
                events(Note(record.name, f"its clock is still that of the snapshot: {error.message}"))
                return
        host.pause(0.2)
