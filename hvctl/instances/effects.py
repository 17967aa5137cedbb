"""The effects that steps of verbs are made of, each from the record alone and each doable twice.

The same functions take back a failed `create`, carry out a `delete`, and finish or undo what a killed process left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hvctl import metadata
from hvctl.backends import get_backend
from hvctl.errors import NotFound
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.libvirtapi import domains, networks
from hvctl.model import Record


def get_domain(host: Host, record: Record) -> Any:
    """libvirt's object for an instance. Raises NotFound."""
    return domains.get(host.connection(record.mode), record.uuid)


def release_address(host: Host, record: Record) -> None:
    """Give its address back to the network; matched by MAC, so nobody else's can be taken."""
    with host.lock(f"network-{record.network}", timeout_s=30):
        networks.release(host.connection(record.mode), record.network, mac=record.mac)


def discard_files(host: Host, record: Record) -> None:
    """Remove its directory of the store."""
    get_backend(record.mode).discard_files(host, record)


def discard_root(host: Host, record: Record) -> None:
    """Remove its layers."""
    get_backend(record.mode).discard_root(host, record)


def kill(host: Host, record: Record) -> None:
    """End its process."""
    try:
        domain = get_domain(host, record)
    except NotFound:
        return
    domains.kill(domain)


def undefine(host: Host, record: Record) -> None:
    """Remove its definition from libvirt."""
    kill(host, record)
    try:
        domain = get_domain(host, record)
    except NotFound:
        return
    domains.undefine(domain)


def apply_autostart(host: Host, record: Record) -> None:
    """Let libvirt start it at boot, or not, as its spec says."""
    domains.set_autostart(get_domain(host, record), record.spec.autostart)


def write_copy(host: Host, record: Record) -> None:
    """Write its definition, as libvirt has it, to the store: for recovery after an accidental `virsh undefine`."""
    xml = domains.get_xml(get_domain(host, record))
    xml = metadata.embed(xml, replace(record, pending=None))  # the intent is libvirt's alone to keep
    host.shell.call(files.write_file, host.store.definition(record.uuid), xml.encode(), 0o600)
