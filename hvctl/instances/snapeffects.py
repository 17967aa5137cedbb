"""The effects that the verbs on snapshots and copies are made of.

Each from the record and its intent alone, each doable twice.
"""

from __future__ import annotations

from dataclasses import replace

from hvctl import metadata, operation
from hvctl.backends import get_backend
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.hostside import layers as layer_files
from hvctl.instances import effects, layers
from hvctl.libvirtapi import domains
from hvctl.model import Consistency, Record, Snapshot
from hvctl.operation import arguments_of

GROW, ASIDE, NAME = "grow", "aside", "name"
"""How a snapshot is taken: a new layer on top, a copy of the top, or nothing but its name (the top is untouched)."""


def find_by_id(record: Record, identifier: str) -> Snapshot | None:
    return next((item for item in record.snapshots if item.id == identifier), None)


def with_snapshot(record: Record, snapshot: Snapshot) -> Record:
    """The record with this snapshot, in the place of one with its identifier."""
    others = tuple(item for item in record.snapshots if item.id != snapshot.id)
    return replace(record, snapshots=(*others, snapshot))


def without_snapshot(record: Record, identifier: str) -> Record:
    """The record without a snapshot; what came from it comes from its parent."""
    gone = find_by_id(record, identifier)
    if gone is None:
        return record
    kept = tuple(
        replace(item, parent=gone.parent) if item.parent == identifier else item
        for item in record.snapshots
        if item.id != identifier
    )
    return replace(record, snapshots=kept, current=gone.parent if record.current == identifier else record.current)


def taken(record: Record) -> Record:
    """The record once its snapshot is taken."""
    arguments = arguments_of(record)
    layer = arguments["layer"]
    stack = record.layers
    if arguments["how"] == GROW and layer not in stack:
        stack = (*stack, layer)
    return replace(record, layers=stack, current=arguments["snapshot"])


def is_taken(host: Host, record: Record) -> bool:
    """Whether libvirt has let a running instance write to the new layer, whatever the record says."""
    arguments = arguments_of(record)
    return arguments["how"] == GROW and get_backend(record.mode).layers.is_on(host, record, arguments["layer"])


def forget_snapshot(host: Host, record: Record) -> None:
    """Take back the claim of a snapshot that was not taken."""
    kept = without_snapshot(record, arguments_of(record)["snapshot"])
    operation.write_record(host, effects.get_domain(host, record), replace(kept, pending=None))


def discard_snapshot_files(host: Host, record: Record) -> None:
    """Remove what belongs to a snapshot beside its layer, and the directory of them all with the last one."""
    folder = host.store.snapshot(record.uuid, arguments_of(record)["snapshot"])
    host.shell.call(files.remove, folder)
    host.shell.call(files.remove_empty, folder.parent)


def discard_new_layer(host: Host, record: Record) -> None:
    """Remove the layer that was made for the change."""
    layer = arguments_of(record)["layer"]
    if layer:
        get_backend(record.mode).layers.discard(host, layer)


def thaw(host: Host, record: Record) -> None:
    """Let a guest that was held still go on."""
    if arguments_of(record).get("freeze") == "yes":
        get_backend(record.mode).layers.thaw(host, record)


def agree(host: Host, record: Record) -> None:
    """Let the definition for the next start name the layers of the record, after a change while it runs."""
    if arguments_of(record).get("live") == "yes":
        restack(host, record)


def restack(host: Host, record: Record) -> None:
    """Let the definition for the next start stand on the layers of the record."""
    xml = domains.get_xml(effects.get_domain(host, record))
    xml = get_backend(record.mode).layers.restack(host, record, layers.image_of(host, record), xml)
    domains.define(host.connection(record.mode), metadata.embed(xml, record))


def seal(host: Host, record: Record) -> None:
    """Take away what could still write to the layer that was the top."""
    if arguments_of(record)["how"] == GROW and len(record.layers) > 1:
        get_backend(record.mode).layers.seal(host, record.layers[-2])


def swap_state(host: Host, record: Record) -> None:
    """Give NVRAM, TPM state and kernel of a snapshot, which lie beside those in use, their names."""
    get_backend(record.mode).layers.swap_state(host, record)


def discard_state(host: Host, record: Record) -> None:
    """Remove what of a snapshot was put beside what is in use."""
    get_backend(record.mode).layers.discard_state(host, record)


def free_old(host: Host, record: Record) -> None:
    """Remove the layers that the change has left, as far as nobody else stands on them."""
    layers.free(host, record, [layer for layer in arguments_of(record)["old"].split(",") if layer])


def is_replaced(host: Host, record: Record) -> bool:
    """Whether the merger has taken the place of the layer that it is to replace."""
    arguments = arguments_of(record)
    keeper = arguments["keeper"]
    facts = host.shell.call(layer_files.read_facts, host.store.layer(keeper)) if keeper else None
    return facts is None or facts.parent == arguments["parent"]


def compacted(record: Record) -> Record:
    """The record once its stack is compacted."""
    gone = arguments_of(record)["old"].split(",")
    return replace(record, layers=tuple(layer for layer in record.layers if layer not in gone))


def free_merged(host: Host, record: Record) -> None:
    """Remove what the merger has replaced and, as far as nobody stands on them, what is in it."""
    discard_new_layer(host, record)
    free_old(host, record)


def mark(record: Record, identifier: str, consistency: Consistency) -> Record:
    """The record, with what a snapshot of it turned out to be."""
    snapshot = find_by_id(record, identifier)
    assert snapshot is not None
    kept = tuple(replace(item, consistency=consistency) if item is snapshot else item for item in record.snapshots)
    return replace(record, snapshots=kept)
