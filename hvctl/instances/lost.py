"""Instances that only the store remembers: their definition is there, libvirt has it no more."""

from __future__ import annotations

from collections.abc import Iterable

from hvctl import metadata
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Record


def list_lost(host: Host, known: Iterable[Record] | None = None) -> list[Record]:
    """Records of definitions in the store whose domain libvirt no longer has, by name; `known`: those that it has."""
    there = known if known is not None else [instance.record for instance in host.instances()]
    uuids = {str(record.uuid) for record in there}
    lost = []
    for name in host.shell.call(files.list_names, host.store.instances):
        path = host.store.instances / name / "domain.xml"
        if name in uuids or not host.shell.call(files.exists, path):
            continue
        record = metadata.find(host.read_text(path))
        if record is not None:
            lost.append(record)
    return sorted(lost, key=lambda record: record.name)
