"""Collecting what crashes left: unfinished changes are finished or undone, dead building directories removed.

Never guesses: stops with exit 8 unless both drivers answered, and a root or directory that no record names is listed
and kept unless `orphans` is said: an unloadable driver must never turn data into rubbish.
"""

from __future__ import annotations

from pathlib import Path

from hvctl import images, operation
from hvctl.errors import HvctlError, WrongState
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import claim, compact, layers, lifecycle, query, snapshots, volumes
from hvctl.instances.recovery import settle
from hvctl.model import Instance, Record, Snapshot
from hvctl.rootfs import building, fetch
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One thing that was found: what, what was (or would be) done, and why not if it was not."""

    what: str
    action: str
    is_done: bool


def collect(
    host: Host, *, dry_run: bool = False, orphans: bool = False, events: Sink = ignore
) -> tuple[Collected, ...]:
    """Settle every interrupted change whose process is gone; list, or with `orphans` remove, what nobody owns.

    A second call finds nothing to do. Raises HostError unless both drivers answered.
    """
    host.require_root("gc")
    instances = host.instances()
    found = [_settle(host, instance, dry_run) for instance in instances if instance.record.pending is not None]
    found += _collect_ephemeral(host, dry_run)
    found += _collect_passing(host, dry_run)
    found += [] if dry_run else _compact(host, events)
    found += collect_building(host, dry_run=dry_run)
    found += _collect_images(host, dry_run)
    found += _collect_downloads(host, dry_run)
    found += _collect_orphans(host, remove=orphans and not dry_run)
    for item in found:
        events(Note("", f"{item.what}: {item.action}"))
    return tuple(found)


def _settle(host: Host, instance: Instance, dry_run: bool) -> Collected:
    name, pending = instance.name, instance.record.pending
    assert pending is not None
    what = f"instance {name}"
    if dry_run:
        return Collected(what=what, action=f"would settle {pending.verb} (at {pending.step})", is_done=False)
    try:
        with host.lock(name):
            current = query.find(host, name)
            if current is None or current.record.pending is None:
                return Collected(what=what, action="was settled meanwhile", is_done=True)
            return Collected(what=what, action=settle(host, current.record), is_done=True)
    except WrongState:
        return Collected(what=what, action=f"left alone: {pending.verb} is under way", is_done=False)
    except HvctlError as error:
        return Collected(what=what, action=f"failed: {error.message}", is_done=False)


def _collect_ephemeral(host: Host, dry_run: bool) -> list[Collected]:
    """Instances of a `run` whose process is gone: its lock is free."""
    found = []
    for instance in host.instances():
        name = instance.name
        if not instance.record.spec.is_ephemeral or host.is_busy(claim.run_lock(name)):
            continue
        if dry_run:
            found.append(Collected(what=f"instance {name}", action="would be deleted: its run is gone", is_done=False))
            continue
        try:
            lifecycle.delete(host, name)
            found.append(Collected(what=f"instance {name}", action="deleted: its run is gone", is_done=True))
        except HvctlError as error:
            found.append(Collected(what=f"instance {name}", action=f"failed: {error.message}", is_done=False))
    return found


def _collect_passing(host: Host, dry_run: bool) -> list[Collected]:
    """Snapshots that were taken for a copy or backup whose process is gone."""
    found = []
    for instance in host.instances():
        if host.is_busy(claim.backup_lock(instance.record.uuid)):
            continue
        if instance.record.pending is None and _passing_snapshots(instance.record):
            what = f"instance {instance.name}"
            action = "what an interrupted copy or backup needed of it is removed"
            if not dry_run:
                try:
                    with host.lock(instance.name):
                        for snapshot in _passing_snapshots(record := query.get(host, instance.name).record):
                            snapshots.delete_locked(host, record, snapshot, ignore)
                            record = query.get(host, instance.name).record
                except HvctlError as error:
                    found.append(Collected(what=what, action=f"left alone: {error.message}", is_done=False))
                    continue
            found.append(Collected(what=what, action=action, is_done=not dry_run))
    return found


def _compact(host: Host, events: Sink) -> list[Collected]:
    """Stacks that have become deep."""
    found = []
    for instance in host.instances():
        if instance.record.pending is None and len(instance.record.layers) >= layers.COMPACT_FROM:
            what = f"instance {instance.name}"
            try:
                count = compact.compact(host, instance.name, events=events)
            except HvctlError as error:
                found.append(Collected(what=what, action=f"not compacted: {error.message}", is_done=False))
                continue
            if count:
                found.append(Collected(what=what, action=f"{count} of its layers merged into others", is_done=True))
    return found


def _passing_snapshots(record: Record) -> list[Snapshot]:
    return [item for item in record.snapshots if item.purpose.is_passing]


def collect_building(host: Host, *, dry_run: bool = False) -> list[Collected]:
    """Building directories whose lock is free: their process is gone."""
    action = "would be removed" if dry_run else "removed"
    return [
        Collected(what=f"building {name}", action=action, is_done=not dry_run)
        for name in building.collect(host, dry_run=dry_run)
    ]


def _collect_images(host: Host, dry_run: bool) -> list[Collected]:
    """Images that have no name any more (a newer build took it) and no user."""
    ids = images.find_unused(host) if dry_run else images.prune(host)
    return [_collected(f"image {image_id[:12]}", dry_run) for image_id in ids]


def _collect_downloads(host: Host, dry_run: bool) -> list[Collected]:
    """Downloads that were interrupted a day ago or earlier; younger ones the next pull goes on with."""
    return [_collected(what, dry_run) for what in fetch.collect(host, dry_run=dry_run, at_once=False)]


def _collected(what: str, dry_run: bool) -> Collected:
    return Collected(what=what, action="would be removed" if dry_run else "removed", is_done=not dry_run)


def _collect_orphans(host: Host, *, remove: bool) -> list[Collected]:
    """Layers and instance directories that no record names, neither in libvirt nor in a copy in the store."""
    found = []
    for path in list_orphans(host):
        if remove:
            host.shell.call(files.remove, path)
        found.append(
            Collected(
                what=str(path),
                action="removed" if remove else "belongs to nobody; kept (--orphans removes it)",
                is_done=remove,
            )
        )
    return found


def list_orphans(host: Host) -> list[Path]:
    """Paths in the store that no instance owns. An instance that only the store's copy knows still owns its files."""
    from hvctl.instances.lost import list_lost

    records = [instance.record for instance in host.instances()] + list_lost(host)
    owned = {str(record.uuid) for record in records} | layers.list_used(host)
    for record in records:  # what a change that is under way has just made
        owned |= layers.tops_of(record) | set(operation.arguments_of(record).values())
    paths = [
        folder / name
        for folder in (host.store.instances, host.store.layers)
        for name in host.shell.call(files.list_names, folder)
        if name not in owned
    ]
    attached = volumes.list_owned(host)
    names = host.shell.call(files.list_names, host.store.volumes)
    # A whole volume without an owner is no orphan: somebody has kept it (`hvctl disk list --unattached`).
    return paths + [
        host.store.volumes / name for name in names if name not in attached and not volumes.is_whole(host, name)
    ]
