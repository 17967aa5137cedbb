"""The effects that steps of verbs are made of, each from the record alone and each doable twice.

The same functions take back a failed `create`, carry out a `delete`, and finish or undo what a killed process left.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvctl import metadata
from hvctl.backends import get_backend
from hvctl.errors import NotFound
from hvctl.host import Host
from hvctl.hostside import files, leases
from hvctl.instances import layers
from hvctl.libvirtapi import domains, networks
from hvctl.model import Instance, Record, State
from hvctl.operation import arguments_of


def keep_address(host: Host, record: Record) -> None:
    """Reserve its address for it again."""
    if record.network:
        networks.reserve(
            host.connection(record.mode),
            record.network,
            name=record.name,
            mac=record.mac,
            address=record.address,
            asks_for_lease=not record.is_application,
        )


def get_domain(host: Host, record: Record) -> Any:
    """libvirt's object for an instance. Raises NotFound."""
    return domains.get(host.connection(record.mode), record.uuid)


def release_address(host: Host, record: Record) -> None:
    """Give its address back to the network; matched by MAC, so nobody else's can be taken."""
    if not record.network:
        return
    with host.lock(f"network-{record.network}", timeout_s=30):
        bridge, address = networks.release(host.connection(record.mode), record.network, mac=record.mac)
        if bridge:
            host.shell.call(leases.end, bridge, address, record.mac)


def name_address(host: Host, record: Record, name: str) -> None:
    """Give its reservation another name, which is what DNS answers to."""
    if not record.network:
        return
    with host.lock(f"network-{record.network}", timeout_s=30):
        networks.rename_reservation(
            host.connection(record.mode),
            record.network,
            mac=record.mac,
            name=name,
            asks_for_lease=not record.is_application,
        )


def finish_rename(host: Host, record: Record) -> None:
    """Finish a renaming that was killed after its commit."""
    get_backend(record.mode).finish_rename(host, record)


def undo_rename(host: Host, record: Record) -> None:
    """Take back what a renaming prepared before its commit."""
    get_backend(record.mode).undo_rename(host, record)


def write_name(host: Host, record: Record) -> None:
    """Tell the instance its name as of the next start."""
    get_backend(record.mode).write_name(host, record)


def discard_files(host: Host, record: Record) -> None:
    """Remove its directory of the store."""
    get_backend(record.mode).discard_files(host, record)


def discard_root(host: Host, record: Record) -> None:
    """Remove its layers, but for those that others stand on."""
    get_backend(record.mode).release_root(host, record)
    if len(record.layers) == 1 and not record.snapshots:  # only a layer that is no top any more can be another's, too
        get_backend(record.mode).layers.discard(host, record.layers[0])
        return
    layers.free(host, record, (*record.layers, *layers.tops_of(record)), is_going=True)


def kill(host: Host, record: Record) -> None:
    """End its process."""
    with contextlib.suppress(NotFound):
        get_backend(record.mode).kill(host, record)


def release(host: Host, record: Record) -> None:
    """Let an instance go on that `publish` has held still; one that was off, or paused by its user, is left alone."""
    if arguments_of(record).get("is_held") == "yes":
        with contextlib.suppress(NotFound):
            get_backend(record.mode).release(host, record)


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


def discard_unwritten(host: Host, record: Record) -> None:
    """Remove what was being written by a process that was killed; it may be a private key."""
    store, uuid = host.store, record.uuid
    for folder in (store.instance(uuid), store.identity(uuid), store.application(uuid)):
        host.shell.call(files.remove_unwritten, folder)


def swap_kernel(host: Host, record: Record) -> None:
    """Give a kernel and initrd that were fetched their names; fine when they have them already."""
    for path in boot_files(host, record):
        host.shell.call(files.replace_if_there, aside(path), path)


def discard_new_kernel(host: Host, record: Record) -> None:
    """Remove a kernel and initrd that were fetched, or half fetched."""
    for path in boot_files(host, record):
        host.shell.call(files.remove, aside(path))


def boot_files(host: Host, record: Record) -> tuple[Path, Path]:
    """An instance's own kernel and initrd."""
    return host.store.kernel(record.uuid), host.store.initrd(record.uuid)


def aside(path: Path) -> Path:
    """Where a newer one of these is put until it is whole."""
    return path.with_name(f"{path.name}.new")


def how_to_stop(instance: Instance) -> str:
    """The command that an instance which is not off is stopped by; a paused one cannot shut down."""
    stop = f"hvctl stop {instance.name}"
    return f"hvctl resume {instance.name}; {stop} (or {stop} --force)" if instance.state is State.PAUSED else stop
