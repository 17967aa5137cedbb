"""Changing an instance's mode while it is off: nothing of it is lost, there and back. Both modes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl import gc
from hvctl.errors import InvalidSpec, WrongState
from hvctl.host import Host
from hvctl.instances import convert, copies, create, layers, lifecycle, query, snapshots
from hvctl.instances.snapshots import Take
from hvctl.model import Mode, Record
from tests import roots, tiny, world

pytestmark = pytest.mark.guest


def other(mode: Mode) -> Mode:
    return next(item for item in Mode if item is not mode)


@pytest.fixture
def name(host: Host, root_image: str) -> Iterator[str]:
    """A free name; whatever stands under it afterwards is deleted, and then the world must be as before."""
    free = f"conv-{secrets.token_hex(3)}"
    before = world.look(host)
    yield free
    for instance in host.instances():
        if instance.name.startswith(free):
            lifecycle.delete(host, instance.name)
    assert world.differences(before, world.look(host)) == []
    assert gc.collect(host) == ()


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


def test_nothing_is_lost_there_and_back(host: Host, mode: Mode, name: str) -> None:
    before = make(host, mode, name)
    snapshots.take(host, name, Take(name="fresh"))
    before = query.get(host, name).record
    roots.change(host, before, live_in)
    files = roots.look(host, before)
    assert {"root/data", "root/again", "etc/motd/below"} < set(files)
    assert "var/log/old" not in files

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


def test_what_cannot_be_is_refused_and_changes_nothing(host: Host, mode: Mode, name: str) -> None:
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
