"""The effects that `convert` is made of, each from the record and its intent alone, each doable twice.

Both drivers have the instance meanwhile, under one UUID. The record with the intent is the one of the mode that it comes
from; once the change is committed that record has the layers and snapshots that the instance will have.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from hvctl import metadata
from hvctl.backends import Secrets, get_backend
from hvctl.errors import HostError, NotFound
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import diskeffects, effects
from hvctl.libvirtapi import domains, networks
from hvctl.model import Mode, Record
from hvctl.operation import arguments_of

_GOING_TIMEOUT_S = 10.0


def as_other(record: Record) -> Record:
    """The record under the mode that it goes to: enough to find the domain and what is there for it."""
    return replace(record, spec=replace(record.spec, mode=Mode(arguments_of(record)["to"])))


def read_secrets(host: Host, record: Record) -> Secrets:
    """The private host key that it has. Raises HostError when it has lost it."""
    path = host.store.identity(record.uuid) / "hvctl.host_key"
    try:
        return Secrets(host_key=host.shell.call(files.read_file, path))
    except HostError as error:
        raise HostError(
            f"{record.name!r} has lost its ssh host key: {error.message}",
            hint=f"a copy gets a new one: hvctl copy {record.name} NAME",
        ) from error


def start_again(host: Host, record: Record) -> None:
    """Start what it was, if it ran. One that has been asked to go off may need a moment for it."""
    domain = effects.get_domain(host, record)
    if arguments_of(record)["ran"] == "yes" and domains.goes_off(domain, timeout_s=_GOING_TIMEOUT_S):
        networks.ensure_active(host.connection(record.mode), record.network)
        domains.start(domain)


def end_new(host: Host, record: Record) -> None:
    """End what was started in the new mode."""
    other = as_other(record)
    with contextlib.suppress(NotFound):
        get_backend(other.mode).kill(host, other)


def undefine_new(host: Host, record: Record) -> None:
    """Remove its definition in the new mode."""
    effects.undefine(host, as_other(record))


def discard_new_root(host: Host, record: Record) -> None:
    """Remove the layers that were made for the new mode."""
    other, arguments = as_other(record), arguments_of(record)
    backend = get_backend(other.mode)
    backend.release_root(host, other)
    for layer in (arguments["top"], arguments["base"]):
        backend.layers.discard(host, layer)


def dress_back(host: Host, record: Record) -> None:
    """Give its directory of the store back to the mode that it had."""
    other = as_other(record)
    get_backend(other.mode).conversion.shed(host, other)
    get_backend(record.mode).dress(host, record, read_secrets(host, record))


def discard_kept(host: Host, record: Record) -> None:
    """Remove what was written down for the snapshot that was to keep it as it was."""
    identifier = arguments_of(record)["snapshot"]
    if identifier:
        folder = host.store.snapshot(record.uuid, identifier)
        host.shell.call(files.remove, folder)
        host.shell.call(files.remove_empty, folder.parent)


def shed(host: Host, record: Record) -> None:
    """Remove what only the mode that it had has in its directory."""
    get_backend(record.mode).conversion.shed(host, record)


def let_volumes_go(host: Host, record: Record) -> None:
    """Write down that nobody has its volumes now."""
    diskeffects.let_all_go(host, record)


def seal_kept(host: Host, record: Record) -> None:
    """Take away what could still write to the layer that the snapshot of what it was ends with."""
    arguments = arguments_of(record)
    if arguments["snapshot"]:
        get_backend(record.mode).layers.seal(host, arguments["old"].split(",")[-1])


def apply_autostart(host: Host, record: Record) -> None:
    """Let libvirt start it at boot, or not, in its new mode."""
    effects.apply_autostart(host, as_other(record))


def write_copy(host: Host, record: Record) -> None:
    """Write its new definition to the store."""
    domain = effects.get_domain(host, as_other(record))
    made = metadata.find(domains.get_xml(domain))
    assert made is not None
    effects.write_copy(host, made)
