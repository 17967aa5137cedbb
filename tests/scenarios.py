"""How each verb is done on an instance of the tiny image, for the fault campaign.

A new verb needs one entry in SCENARIOS, under its name in `instances/verbs.py`: what must be there before (`prepare`;
the instance itself is made unless `needs_instance=False`), the deed (`act`, which must hand on `events`), and how it
looks once it is done (`is_done`, by what libvirt and the store say; it also asserts that what must not have changed has
not). What the deed makes beside the instance is called NAME-new, so that it is found and deleted afterwards. A verb that
can be done in one mode only stands in UNSUPPORTED with the other. That is all: the campaign (campaign.py) then kills,
interrupts and starves it at each of its steps in both modes; add its name to SWEPT to have its system calls failed one
by one, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hvctl import images
from hvctl.backups import create as backing_up
from hvctl.backups import restore as restoring
from hvctl.backups.opening import open_repository
from hvctl.backups.repository import Repository
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.instances import (
    change,
    compact,
    convert,
    copies,
    create,
    disks,
    layers,
    lifecycle,
    publish,
    query,
    snapshots,
)
from hvctl.instances.verbs import VERBS
from hvctl.model import Mode, Throttle
from hvctl.operation import CLEAR
from hvctl.units import MIB
from tests import roots, stacks, tiny


@dataclass(frozen=True)
class Scenario:
    """A verb as it is done on an instance: what must be there before, the deed, and how it looks when it is done."""

    needs_instance: bool
    act: Callable[[Host, Mode, str, Sink], object]
    is_done: Callable[[Host, str], bool]
    prepare: Callable[[Host, str], object] = lambda host, name: None
    """What is done to the instance before."""
    image: str = "tiny"


def _write(host: Host, name: str, value: int) -> None:
    stacks.write(host, query.get(host, name).record, 0, value)


def _take_one(host: Host, name: str) -> None:
    """One snapshot, `one`, and something written since."""
    _write(host, name, 1)
    snapshots.take(host, name, snapshots.Take(name="one"))
    _write(host, name, 2)


def _content(host: Host, name: str) -> int:
    record = query.get(host, name).record
    return stacks.read(host, record, record.layers)[0]


def _has_snapshot(host: Host, name: str, snapshot: str, value: int) -> bool:
    """Whether it is listed; then it must hold what it should, and the rest too."""
    record = query.get(host, name).record
    found = next((item for item in record.snapshots if item.name == snapshot), None)
    if found is not None:
        assert stacks.read(host, record, layers.stack_of(host, found.layer))[0] == value
    return found is not None


def _is_reverted(host: Host, name: str) -> bool:
    assert _has_snapshot(host, name, "one", 1)
    return _content(host, name) == 1


def make_instance(host: Host, mode: Mode, name: str, events: Sink = ignore, *, image: str = "tiny") -> object:
    request = create.Request(spec=tiny.make_spec(name, mode, image), start=False)
    return create.create(host, request, events)


def make_tiny_container(host: Host, name: str, events: Sink) -> object:
    """A deed for victims of other modules."""
    return make_instance(host, Mode.CONTAINER, name, events)


def _add_disk(host: Host, name: str, events: Sink) -> object:
    return disks.add(host, name, disks.DiskRequest(name="data", size_bytes=16 * MIB, filesystem="ext4"), events=events)


def _is_set(host: Host, name: str) -> bool:
    """By libvirt's word; then the record must say the same."""
    instance = query.get(host, name)
    if instance.live.cpus == 2:
        assert (instance.record.spec.cpus, instance.record.spec.autostart, instance.live.is_autostart) == (
            2,
            True,
            True,
        )
    return instance.live.cpus == 2


def _publish(host: Host, _mode: Mode, name: str, events: Sink) -> object:
    """And away with the image: the instance, and nothing else, is to be there afterwards."""
    publish.publish(host, publish.Publication(instance=name, image=f"{name}-image", keep_identity=True), events)
    return images.delete(host, f"{name}-image")


def _delete_one(host: Host, _mode: Mode, name: str, events: Sink) -> object:
    return snapshots.delete(host, name, "one", events)


def _copy_one(host: Host, _mode: Mode, name: str, events: Sink) -> object:
    request = copies.Request(source=name, snapshot="one", name=f"{name}-new", start=False)
    return copies.copy(host, request, events)


def _repository_of(host: Host, name: str) -> Repository:
    return open_repository(host, str(host.store.run / f"backups-{name.removesuffix('-new')}"))


def _make_repository(host: Host, name: str) -> None:
    _add_disk(host, name, ignore)
    _repository_of(host, name).make()


def _back_up(host: Host, name: str) -> None:
    _write(host, name, 5)
    _repository_of(host, name).make()
    backing_up.create(host, _repository_of(host, name), backing_up.Wanted(name=name))


def _lend(host: Host, _mode: Mode, name: str, events: Sink) -> object:
    return backing_up.create(host, _repository_of(host, name), backing_up.Wanted(name=name), events)


def _is_given_back(host: Host, name: str) -> bool:
    record = query.get(host, name).record
    return record.pending is None and not record.snapshots


def _restore(host: Host, _mode: Mode, name: str, events: Sink) -> object:
    request = restoring.Request(backup=name, name=f"{name}-new", start=False)
    return restoring.restore(host, _repository_of(host, name), request, events)


def _make_deep(host: Host, name: str) -> None:
    """Four layers, of which the lowest two are nobody's."""
    for value in (1, 2, 3):
        _write(host, name, value)
        snapshots.take(host, name, snapshots.Take(name=f"s{value}"))
    _write(host, name, 4)
    for value in (1, 2):
        snapshots.delete(host, name, f"s{value}")


def _is_compact(host: Host, name: str) -> bool:
    assert (_content(host, name), _has_snapshot(host, name, "s3", 3)) == (4, True)
    return len(query.get(host, name).record.layers) == 2


def _is_copied(host: Host, name: str) -> bool:
    assert (_content(host, name), _has_snapshot(host, name, "one", 1)) == (2, True)
    return query.find(host, f"{name}-new") is not None and _content(host, f"{name}-new") == 1


def _edit(root: Path, first_id: int) -> None:
    (root / "etc/new").write_text("new\n")
    os.chown(root / "etc/new", first_id, first_id)
    (root / "var/log/old").unlink()


def _convert(host: Host, mode: Mode, name: str, events: Sink) -> object:
    to = next(item for item in Mode if item is not mode)
    return convert.convert(host, convert.Request(name=name, mode=to), events)


def _is_converted(host: Host, name: str) -> bool:
    """By the snapshot that has it as it was, which must show just what it shows now."""
    record = query.get(host, name).record
    shown = roots.look(host, record)
    assert {"etc/motd", "etc/new"} <= set(shown)
    assert "var/log/old" not in shown
    kept = next((item for item in record.snapshots if item.mode is not record.mode), None)
    if kept is None:
        return False
    was = replace(record, spec=replace(record.spec, mode=kept.mode))
    assert roots.look(host, was, layers.stack_of(host, kept.layer)) == shown
    return True


SCENARIOS = {
    "convert": Scenario(
        needs_instance=True,
        image="tiny-root",
        prepare=lambda host, name: roots.change(host, query.get(host, name).record, _edit),
        act=_convert,
        is_done=_is_converted,
    ),
    "publish": Scenario(
        needs_instance=True,
        act=_publish,
        is_done=lambda host, name: query.get(host, name).record.pending is None,
    ),
    "create": Scenario(
        needs_instance=False,
        act=make_instance,
        is_done=lambda host, name: query.find(host, name) is not None,
    ),
    "delete": Scenario(
        needs_instance=True,
        prepare=_take_one,
        act=lambda host, _mode, name, events: lifecycle.delete(host, name, events),
        is_done=lambda host, name: query.find(host, name) is None,
    ),
    "rename": Scenario(
        needs_instance=True,
        act=lambda host, _mode, name, events: change.rename(host, name, f"{name}-new", events),
        is_done=lambda host, name: query.find(host, f"{name}-new") is not None,
    ),
    "disk-add": Scenario(
        needs_instance=True,
        act=lambda host, _mode, name, events: _add_disk(host, name, events),
        is_done=lambda host, name: bool(query.get(host, name).record.disks),
    ),
    "disk-remove": Scenario(
        needs_instance=True,
        act=lambda host, _mode, name, events: disks.remove(host, name, "data", events=events),
        is_done=lambda host, name: not query.get(host, name).record.disks,
        prepare=lambda host, name: _add_disk(host, name, ignore),
    ),
    "disk-resize": Scenario(
        needs_instance=True,
        act=lambda host, _mode, name, events: disks.resize(host, name, "data", 32 * MIB, events),
        is_done=lambda host, name: [disk.size_bytes for disk in query.get(host, name).record.disks] == [32 * MIB],
        prepare=lambda host, name: _add_disk(host, name, ignore),
    ),
    "disk-set": Scenario(
        needs_instance=True,
        act=lambda host, _mode, name, events: disks.throttle(host, name, "data", Throttle(iops=100), events),
        is_done=lambda host, name: query.get(host, name).record.disks[0].throttle.iops == 100,
        prepare=lambda host, name: _add_disk(host, name, ignore),
    ),
    "set": Scenario(
        needs_instance=True,
        act=lambda host, _mode, name, events: change.set_(
            host, name, change.Changes(cpus=2, is_autostart=True), events
        ),
        is_done=_is_set,
    ),
    "copy": Scenario(
        needs_instance=True,
        prepare=_take_one,
        act=_copy_one,
        is_done=_is_copied,
    ),
    "compact": Scenario(
        needs_instance=True,
        prepare=_make_deep,
        act=lambda host, _mode, name, events: compact.compact(host, name, depth=2, events=events),
        is_done=_is_compact,
    ),
    "lend": Scenario(
        needs_instance=True,
        prepare=_make_repository,
        act=_lend,
        is_done=_is_given_back,
    ),
    "restore": Scenario(
        needs_instance=True,
        prepare=_back_up,
        act=_restore,
        is_done=lambda host, name: query.find(host, f"{name}-new") is not None and _content(host, f"{name}-new") == 5,
    ),
    "snapshot-take": Scenario(
        needs_instance=True,
        prepare=lambda host, name: _write(host, name, 3),
        act=lambda host, _mode, name, events: snapshots.take(host, name, snapshots.Take(name="new"), events),
        is_done=lambda host, name: _content(host, name) == 3 and _has_snapshot(host, name, "new", 3),
    ),
    "snapshot-revert": Scenario(
        needs_instance=True,
        prepare=_take_one,
        act=lambda host, _mode, name, events: snapshots.revert(host, name, "one", events=events),
        is_done=_is_reverted,
    ),
    "snapshot-delete": Scenario(
        needs_instance=True,
        prepare=_take_one,
        act=_delete_one,
        is_done=lambda host, name: _content(host, name) == 2 and not _has_snapshot(host, name, "one", 1),
    ),
}

# Verbs that need a guest that answers; their steps are killed in test_images_guest.py.
IN_A_GUEST = {"kernel"}

# Refused by a mode before anything is done: test_disks.py has the refusal.
UNSUPPORTED = {("disk-set", Mode.CONTAINER)}

# Verbs whose system calls are failed one by one.
SWEPT = ("snapshot-take", "snapshot-revert", "snapshot-delete", "delete", "copy", "compact", "restore", "convert")

POINTS = [
    (verb.name, step)
    for verb in VERBS.values()
    for step in verb.step_names()
    if verb.name not in IN_A_GUEST and not (verb.removes_domain and step == CLEAR)
]
