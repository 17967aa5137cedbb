"""Who stands on which layers: they are counted references, and go when nobody names them any more.

A record names the layers of its stack and the last layer of each snapshot; a layer names the one below it
(`hostside/layers.py`). So nothing is counted in a file that could be wrong: who asks, looks.
"""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from hvctl.backends import get_backend
from hvctl.errors import HostError, WrongState
from hvctl.host import Host
from hvctl.hostside import files, layers
from hvctl.instances.lost import list_lost
from hvctl.model import Image, Record
from hvctl.rootfs import published
from hvctl.units import MIB, format_size

DEEPEST = 120
"""Layers of one root. An overlay takes 500, libvirt reads chains of 200; each layer costs a little at every start."""
COMPACT_FROM = 32
"""A stack of this many layers is compacted by `gc`: layers that no snapshot ends with are merged."""

_RESERVE_BYTES = 64 * MIB
_LOCK = "layers.free"  # no instance can have this name: the dot
_LOCK_TIMEOUT_S = 60
_GOING = ("delete",)


def stack_of(host: Host, top: str) -> tuple[str, ...]:
    """The layers that end with this one, lowest first; none for the image itself."""
    return tuple(host.shell.call(layers.list_stack, host.store.layers, top))


def image_of(host: Host, record: Record) -> Image:
    """The image that an instance stands on. Raises HostError when it is damaged."""
    return published.read(host, record.image_id, record.spec.image)


def tops_of(record: Record) -> set[str]:
    """Every layer that a record names."""
    return {*record.layers, *(snapshot.layer for snapshot in record.snapshots if snapshot.layer)}


def list_records(host: Host) -> list[Record]:
    """Every record: libvirt's, and those in the store that libvirt has lost. Raises HostError unless both drivers answered."""
    known = [instance.record for instance in host.instances()]
    return [*known, *list_lost(host, known)]


def list_used(host: Host, *, but: UUID | None = None) -> set[str]:
    """The layers that somebody stands on; those of an instance that is being deleted are on their way."""
    used: set[str] = set()
    for record in list_records(host):
        if record.uuid == but or (record.pending is not None and record.pending.verb in _GOING):
            continue
        for top in tops_of(record):
            if top not in used:
                used.update((top, *stack_of(host, top)))
    return used


def free(host: Host, record: Record, tops: Iterable[str], *, is_going: bool = False) -> None:
    """Remove the layers of these stacks that nobody stands on; `is_going`: the record itself does not any more.

    Lowest first, so that what a crash leaves can still be found from the top.
    """
    wanted = [top for top in dict.fromkeys(tops) if host.shell.call(files.exists, host.store.layer(top))]
    if not wanted:
        return
    with host.lock(_LOCK, timeout_s=_LOCK_TIMEOUT_S):
        used = list_used(host, but=record.uuid if is_going else None)
        backend = get_backend(record.mode)
        going: list[str] = []
        for top in wanted:
            if top not in used and top not in going:
                going += [layer for layer in stack_of(host, top) if layer not in used and layer not in going]
        for layer in going:
            backend.layers.discard(host, layer)


def check_depth(host: Host, record: Record) -> None:
    """Raise WrongState when one more layer would be too many."""
    depth = get_backend(record.mode).layers.measure_depth(host, record)
    if depth < DEEPEST:
        return
    message = f"{record.name!r} stands on {depth} layers, which is the limit"
    if len(record.layers) < DEEPEST:
        raise WrongState(
            message, hint=f"what was compacted since it was started counts no more after: hvctl restart {record.name}"
        )
    raise WrongState(message, hint=f"hvctl snapshot delete {record.name} what is not needed, then: hvctl gc")


def check_space(host: Host, needed_bytes: int, *, what: str) -> None:
    """Raise HostError, before anything is begun, when the store's disk has not this much and a reserve."""
    free_bytes = host.shell.call(files.available_bytes, host.store.layers)
    if free_bytes < needed_bytes + _RESERVE_BYTES:
        raise HostError(
            f"not enough space for {what}: {format_size(needed_bytes)} needed, {format_size(free_bytes)} free",
            hint="free some space: hvctl host doctor, hvctl gc",
        )
