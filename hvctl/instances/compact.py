"""Compaction: layers that nobody ends with any more become part of the one above them.

Nothing is merged in place. The merger is made aside, synced, and takes the place of the upper layer by one rename(2); it
shows the same to everybody who stands on it, so no other instance has to know. From then on the lower ones are not
needed, and the record lets go of them. A running VM keeps the old files open until its next start.
"""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

from hvctl import operation
from hvctl.backends import get_backend
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.hostside import layers as layer_files
from hvctl.instances import layers
from hvctl.instances.claim import claim_existing
from hvctl.instances.recovery import get_settled
from hvctl.instances.verbs import COMPACT
from hvctl.model import Purpose, Record, State


def compact(host: Host, name: str, *, depth: int = layers.COMPACT_FROM, events: Sink = ignore) -> int:
    """Merge what can be merged of an instance's stack when it has `depth` layers or more; how many layers went.

    Raises HostError without space. Killed at any moment it loses nothing.
    """
    host.require_root("gc")
    with host.lock(name):
        record = get_settled(host, name).record
        before = len(record.layers)
        if before < depth:
            return 0
        record = _refresh(host, record, events)
        while (run := find_run(host, record)) is not None:
            record = _merge(host, record, run, events)
        return before - len(record.layers)


def find_run(host: Host, record: Record) -> tuple[str, ...] | None:
    """Layers of its stack, lowest first, of which only the last is needed as such; the lowest such run."""
    mode_layers, used = get_backend(record.mode).layers, layers.list_used(host)
    records = layers.list_records(host)
    writable = {other.layers[-1] for other in records}
    ends = writable | {snapshot.layer for other in records for snapshot in other.snapshots}
    parents = [host.shell.call(layer_files.read_facts, host.store.layer(layer)).parent for layer in used]
    fixed = set(writable)
    if not mode_layers.is_replaced_while_running:
        fixed |= _list_open(host)
    fixed |= _list_read(host, records)
    droppable = {layer for layer in used - ends if parents.count(layer) == 1} - (fixed - writable)
    for run in _runs(record.layers, droppable, fixed=fixed):
        for group in mode_layers.group(host, run):
            if len(group) > 1:
                return group
    return None


def _list_open(host: Host) -> set[str]:
    """The layers that running instances stand on."""
    off = (State.STOPPED, State.CRASHED)
    return {
        layer for instance in host.instances() if instance.live.state not in off for layer in instance.record.layers
    }


def _list_read(host: Host, records: list[Record]) -> set[str]:
    """The layers that a backup reads."""
    tops = {item.layer for record in records for item in record.snapshots if item.purpose is Purpose.BACKUP}
    return {layer for top in tops for layer in layers.stack_of(host, top)}


def _runs(stack: tuple[str, ...], droppable: set[str], *, fixed: set[str]) -> list[tuple[str, ...]]:
    """Consecutive droppable layers, each with the one above, unless that may not be replaced."""
    found: list[tuple[str, ...]] = []
    current: tuple[str, ...] = ()
    for layer in stack:
        if layer in droppable:
            current = (*current, layer)
            continue
        found.append(current if layer in fixed else (*current, layer))
        current = ()
    return [*found, current]


def _refresh(host: Host, record: Record, events: Sink) -> Record:
    """Let go of layers that another instance's compaction has made part of others already."""
    stack = layers.stack_of(host, record.layers[-1])
    gone = tuple(layer for layer in record.layers if layer not in stack)
    return _change(host, record, (), gone, events) if gone else record


def _merge(host: Host, record: Record, run: tuple[str, ...], events: Sink) -> Record:
    needed_bytes = sum(host.shell.call(files.disk_usage, host.store.layer(layer)) for layer in run)
    layers.check_space(host, needed_bytes, what=f"compacting {record.name!r}")
    return _change(host, record, run, run[:-1], events)


def _change(host: Host, record: Record, run: tuple[str, ...], gone: tuple[str, ...], events: Sink) -> Record:
    aside = str(uuid4()) if run else ""
    parent = host.shell.call(layer_files.read_facts, host.store.layer(run[0])).parent if run else ""
    pending = operation.intend(COMPACT, layer=aside, keeper=run[-1] if run else "", parent=parent, old=",".join(gone))
    image = layers.image_of(host, record)
    claimed = replace(record, pending=pending)
    with operation.begin(host, COMPACT, claimed, claim_existing(host), events) as change:
        with change.step("merge"):
            if run:
                get_backend(record.mode).layers.merge(host, image, run, parent, host.store.layer(aside))
        with change.step("replace"):
            if run:
                host.shell.call(layer_files.replace, host.store.layer(run[-1]), host.store.layer(aside))
        assert COMPACT.outcome is not None
        change.record = COMPACT.outcome(change.record)
        change.redo_after("replace")
    return change.record
