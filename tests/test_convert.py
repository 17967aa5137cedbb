"""Changing an instance's mode while it is off: nothing of it is lost, there and back. Both modes."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from hvctl import gc
from hvctl.backends import get_backend
from hvctl.backups import create as backing_up
from hvctl.backups import restore as restoring
from hvctl.backups.opening import open_repository
from hvctl.config import Config
from hvctl.errors import AlreadyExists, HostError, InvalidSpec, NotManaged, WrongState
from hvctl.events import Event
from hvctl.host import Host
from hvctl.instances import convert, copies, create, disks, layers, query, snapshots, volumes
from hvctl.instances.snapshots import Take
from hvctl.libvirtapi import domains
from hvctl.model import Mode, Mount, Record
from hvctl.units import GIB, MIB
from tests import roots, stores, tiny, world
from tests.cli import run

pytestmark = [pytest.mark.guest, pytest.mark.apart]


def other(mode: Mode) -> Mode:
    return next(item for item in Mode if item is not mode)


@pytest.fixture
def name(host: Host, root_image: str) -> Iterator[str]:
    with world.visiting(host, "conv") as free:
        yield free


def make(host: Host, mode: Mode, name: str) -> Record:
    spec = tiny.make_spec(name, mode, "tiny-root")
    create.create(host, create.Request(spec=spec, start=False, authorized_keys=(tiny.PUBLIC_KEY,)))
    return query.get(host, name).record


def turn(host: Host, name: str, mode: Mode) -> tuple[Record, str]:
    """Convert it; its record, and the snapshot of what it was."""
    outcome = convert.convert(host, convert.Request(name=name, mode=mode))
    assert outcome.is_changed
    return outcome.instance.record, outcome.kept


def live_in(root: Path, first_id: int) -> None:
    """What happens to a system."""
    (root / "root/data").write_bytes(b"precious\n" * 5000)
    os.chown(root / "root/data", first_id + 1000, first_id + 65534)
    (root / "root/data").chmod(0o4750)
    os.setxattr(root / "root/data", "user.note", b"mine")
    os.link(root / "root/data", root / "root/again")
    with (root / "root/holes").open("wb") as stream:
        stream.truncate(1024**2)
        stream.seek(512 * 1024)
        stream.write(b"middle")
    os.symlink("../etc/motd", root / "root/a link")
    os.mkfifo(root / "root/fifo", 0o620)
    for path in ("root/a link", "root/fifo", "root/holes"):
        os.chown(root / path, first_id, first_id, follow_symlinks=False)
    (root / "var/log/old").unlink()
    (root / "etc/motd").unlink()
    (root / "etc/motd").mkdir(0o700)
    (root / "etc/motd/below").write_text("a file was here\n")
    for path in ("etc/motd", "etc/motd/below"):
        os.chown(root / path, first_id + 33, first_id + 33)
    os.utime(root / "sbin/init", (1_000_000_000, 1_000_000_000))
    (root / "root/able").write_text("")
    os.chown(root / "root/able", first_id, first_id)
    os.setxattr(root / "root/able", "security.capability", _format_capability(first_id))


def _format_capability(first_id: int) -> bytes:
    """CAP_NET_RAW (capabilities(7), File capability extended attribute versioning), as root of these ids gives it."""
    permitted = 1 << 13
    if not first_id:
        return struct.pack("<5I", 0x02000001, permitted, 0, 0, 0)
    return struct.pack("<6I", 0x03000001, permitted, 0, 0, 0, first_id)


def test_nothing_is_lost_there_and_back(host: Host, mode: Mode, name: str) -> None:
    before = make(host, mode, name)
    snapshots.take(host, name, Take(name="fresh"))
    before = query.get(host, name).record
    roots.change(host, before, live_in)
    files = roots.look(host, before)
    assert {"root/data", "root/again", "etc/motd/below"} < set(files)
    assert "var/log/old" not in files
    assert files["root/able"][4] == (("security.capability", _format_capability(0)),)

    there, first = turn(host, name, other(mode))
    assert roots.look(host, there) == files
    back, second = turn(host, name, mode)
    assert roots.look(host, back) == files
    for record in there, back:
        same = ("uuid", "address", "mac", "host_key", "authorized_keys", "login_user", "created_at", "image_id")
        assert [getattr(record, field) for field in same] == [getattr(before, field) for field in same]
        assert replace(record.spec, mode=mode, disk_bytes=0) == replace(before.spec, disk_bytes=0)
    assert [(item.name, item.mode) for item in snapshots.list_snapshots(back)] == [
        ("fresh", mode),
        (first, mode),
        (second, other(mode)),
    ]
    assert gc.collect(host) == ()


def test_snapshots_of_both_modes_stay_what_they_were(host: Host, mode: Mode, name: str) -> None:
    record = make(host, mode, name)
    fresh = roots.look(host, record)
    snapshots.take(host, name, Take(name="fresh"))
    roots.change(host, query.get(host, name).record, live_in)
    lived = roots.look(host, query.get(host, name).record)
    _there, kept = turn(host, name, other(mode))
    with pytest.raises(WrongState, match="as a") as refused:
        snapshots.revert(host, name, "fresh")
    assert f"hvctl convert {name} --to {mode}" in refused.value.hint
    with pytest.raises(WrongState, match="as a"):
        snapshots.diff(host, name, "fresh", kept)
    copies.copy(host, copies.Request(source=name, snapshot="fresh", name=f"{name}-copy", start=False))
    twin = query.get(host, f"{name}-copy").record
    assert (twin.mode, roots.look(host, twin)["var/log/old"]) == (mode, fresh["var/log/old"])
    snapshots.take(host, name, Take(name="later"))

    turn(host, name, mode)
    snapshots.revert(host, name, "fresh")
    assert roots.look(host, query.get(host, name).record) == fresh
    snapshots.revert(host, name, kept)
    assert roots.look(host, query.get(host, name).record) == lived
    for item in snapshots.list_snapshots(query.get(host, name).record):
        snapshots.delete(host, name, item.name)
    assert roots.look(host, query.get(host, name).record) == lived
    assert len(host.shell.call(os.listdir, host.store.layers)) == len(layers.list_used(host))


def test_what_is_of_that_mode_already_stays_as_it_is(host: Host, mode: Mode, name: str) -> None:
    record = make(host, mode, name)
    before = world.look(host)
    outcome = convert.convert(host, convert.Request(name=name, mode=mode))
    assert (outcome.is_changed, outcome.kept) == (False, "")
    assert world.differences(before, world.look(host)) == []
    assert record.mode is mode


def test_a_root_that_is_none_is_refused(host: Host, tiny_image: str, name: str) -> None:
    """The disk of this VM has no file system at all."""
    create.create(host, create.Request(spec=tiny.make_spec(name, Mode.VM), start=False))
    before = world.look(host)
    with pytest.raises(InvalidSpec, match="no Linux root"):
        convert.convert(host, convert.Request(name=name, mode=Mode.CONTAINER))
    assert world.differences(before, world.look(host)) == []


def test_an_owner_that_a_container_cannot_have_is_refused(host: Host, name: str) -> None:
    record = make(host, Mode.VM, name)
    roots.change(host, record, lambda root, _first: os.chown(root / "etc/motd", 100000, 0))
    before = world.look(host)
    with pytest.raises(InvalidSpec, match="has the uid 100000"):
        convert.convert(host, convert.Request(name=name, mode=Mode.CONTAINER))
    assert world.differences(before, world.look(host)) == []


def test_what_the_other_mode_cannot_have_is_said_before_anything_happens(
    host: Host, settings: Config, name: str, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    spec = tiny.make_spec(name, Mode.CONTAINER, "tiny-root")
    mount = Mount(source=str(tmp_path / "shared"), target="/srv/shared")
    spec = replace(spec, is_privileged=True, processes=100, mounts=(mount,), autostart=True)
    create.create(host, create.Request(spec=spec, start=False))
    disks.add(host, name, disks.DiskRequest(name="data", size_bytes=16 * MIB, filesystem="ext4"))
    before = world.look(host)
    asked = run(settings, "convert", name, "--to", "vm")
    assert (asked.status, "--yes" in asked.err) == (2, True)
    for word in ("/srv/shared", "--privileged", "100 processes", "data"):
        assert f"{name}: it gives up" in asked.err
        assert word in asked.err
    assert world.differences(before, world.look(host)) == []

    assert run(settings, "convert", name, "--to", "vm", "--yes").status == 0
    made = query.get(host, name)
    assert (made.record.spec.mounts, made.record.spec.is_privileged, made.record.disks) == ((), False, ())
    assert made.live.is_autostart
    kept = volumes.get_unattached(host, "data")
    assert kept.last_owner == name
    done = run(settings, "convert", name, "--to", "container", "--yes", "--json")
    assert done.status == 0, done.err
    assert query.get(host, name).record.first_id  # and no longer the host's root
    privileged = query.get(host, name).record.snapshots[0].name
    with pytest.raises(WrongState, match="was privileged"):
        snapshots.revert(host, name, privileged)
    volumes.discard(host, kept.id)


def test_a_size_that_a_container_cannot_have_here_is_said_and_comes_back(host: Host, name: str, tmp_path: Path) -> None:
    """The store of the tests is on a file system without project quotas."""
    spec = replace(tiny.make_spec(name, Mode.VM, "tiny-root"), disk_bytes=2 * GIB)
    create.create(host, create.Request(spec=spec, start=False))
    said = [line for line in convert.list_losses(host, name, Mode.CONTAINER) if "2GiB" in line]
    assert len(said) == 1 and "keeps no project quotas" in said[0]
    turn(host, name, Mode.CONTAINER)
    root, *_others = disks.list_disks(host, query.get(host, name))
    assert root.size_bytes == 0

    repository = open_repository(host, str(tmp_path / "backups"))
    repository.make()
    backing_up.create(host, repository, backing_up.Wanted(name=name))
    told: list[Event] = []
    restoring.restore(host, repository, restoring.Request(backup=name, name=f"{name}-new", start=False), told.append)
    assert "without its limit of 2GiB" in stores.notes(told)
    assert query.get(host, f"{name}-new").record.spec.disk_bytes == 0
    back, _kept = turn(host, name, Mode.VM)
    assert back.spec.disk_bytes == 2 * GIB


def test_too_little_memory_for_the_other_mode_names_the_way(host: Host, settings: Config, name: str) -> None:
    make(host, Mode.CONTAINER, name)
    assert run(settings, "set", name, "--memory", "64MiB").status == 0
    refused = run(settings, "convert", name, "--to", "vm", "--yes")
    assert (refused.status, f"hvctl set {name} --memory 128MiB" in refused.err) == (7, True)


def test_a_name_that_is_taken_in_the_other_mode_is_refused(host: Host, mode: Mode, name: str) -> None:
    """Somebody else's domain of that name: the drivers' lists of names are separate."""
    make(host, mode, name)
    theirs = get_backend(other(mode))
    stranger = replace(query.get(host, name).record, uuid=uuid4(), spec=tiny.make_spec(name, other(mode)))
    domain = domains.define(host.connection(other(mode)), theirs.format_stub(stranger))
    before = world.look(host)
    try:
        with pytest.raises((AlreadyExists, NotManaged)):
            convert.convert(host, convert.Request(name=name, mode=other(mode)))
        assert world.differences(before, world.look(host)) == []
    finally:
        domains.undefine(domain)


def test_no_space_is_found_before_anything_is_begun(
    host: Host, mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(host, mode, name)
    before = world.look(host)
    monkeypatch.setattr(layers, "_RESERVE_BYTES", 2**60)
    with pytest.raises(HostError, match="not enough space for converting"):
        convert.convert(host, convert.Request(name=name, mode=other(mode)))
    assert world.differences(before, world.look(host)) == []


def test_a_lost_host_key_is_told_and_nothing_is_begun(host: Host, mode: Mode, name: str) -> None:
    record = make(host, mode, name)
    (host.store.identity(record.uuid) / "hvctl.host_key").unlink()
    before = world.look(host)
    with pytest.raises(HostError, match="has lost its ssh host key"):
        convert.convert(host, convert.Request(name=name, mode=other(mode)))
    assert world.differences(before, world.look(host)) == []


def test_one_that_was_converted_is_backed_up_and_restored_as_any(
    host: Host, mode: Mode, name: str, tmp_path: Path
) -> None:
    """Its lowest layer is neither what the image has nor what a container of its ids has written."""
    roots.change(host, make(host, mode, name), live_in)
    turn(host, name, other(mode))
    repository = open_repository(host, str(tmp_path / "backups"))
    repository.make()
    backing_up.create(host, repository, backing_up.Wanted(name=name))
    request = restoring.Request(backup=name, name=f"{name}-new", start=False)
    restoring.restore(host, repository, request)
    restored = query.get(host, f"{name}-new").record
    shown = roots.look(host, restored)
    own = {"etc/machine-id", "etc"}  # a copy's
    was = roots.look(host, query.get(host, name).record)
    assert {path: facts for path, facts in shown.items() if path not in own} == {
        path: facts for path, facts in was.items() if path not in own
    }
