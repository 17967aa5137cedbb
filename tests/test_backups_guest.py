"""Backups of real guests that run, restored into an empty store; and of such with data volumes. Both modes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import gc, images
from hvctl.config import Config
from hvctl.host import Host
from hvctl.instances import disks, lifecycle, query
from hvctl.model import Instance, Mode, State, Wait
from hvctl.units import MIB
from tests import stores
from tests.cli import run
from tests.test_guest import make
from tests.test_snapshots_guest import inside

pytestmark = pytest.mark.guest


@pytest.fixture
def subject(host: Host, mode: Mode, debian_image: str) -> Iterator[Instance]:
    instance = make(host, "kept", mode, debian_image, wait=Wait.AGENT)
    yield instance
    for name in ("kept", "kept-again"):
        if query.find(host, name) is not None:
            lifecycle.delete(host, name)


@pytest.mark.long_in(Mode.VM, image="comes along")
@pytest.mark.long_in(Mode.CONTAINER, image="is there")
@pytest.mark.parametrize("image", ["comes along", "is there"])
def test_a_running_guest_comes_back_elsewhere_as_it_was(
    host: Host, elsewhere: Host, settings: Config, mode: Mode, subject: Instance, image: str, tmp_path: Path
) -> None:
    """The image of half a gigabyte is stored and restored in one mode a day; test_backups.py has that in both."""
    token, repo = secrets.token_hex(8), ("--repo", str(tmp_path / "repository"))
    disks.add(host, "kept", disks.DiskRequest(name="data", size_bytes=32 * MIB, filesystem="ext4"))
    mount = "mount /dev/disk/by-id/virtio-data /srv/data && " if mode is Mode.VM else ""
    inside(settings, "kept", f"mkdir -p /srv/data && {mount} echo {token} > /srv/data/file")
    inside(settings, "kept", f"echo {token} > /root/token; rm -f /etc/motd; mkdir /root/new; ln -s token /root/link")
    owned = "install -o 1000 -g 2000 /dev/null /root/owned; setcap cap_net_raw+ep /root/owned 2>/dev/null || true"
    inside(settings, "kept", owned)
    assert run(settings, "backup", "init", *repo[1:]).status == 0
    words: tuple[str, ...] = ("kept", *repo)
    if image == "is there":
        stores.lend(host.store.root, elsewhere.store, subject.record.spec.image)
        words = ("kept", "--without-image", *repo)
    done = run(settings, "backup", "create", *words)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert query.get(host, "kept").state is State.RUNNING
    inside(settings, "kept", "echo later > /root/token; echo later > /srv/data/file; sync")
    done = run(settings, "backup", "create", "--comment", "later", *words)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert run(settings, "backup", "verify", *repo).status == 0
    rows = [line.split() for line in run(settings, "backup", "list", "kept", *repo).out.splitlines()[1:]]
    assert [row[3] for row in rows] == ["frozen"] * 2
    assert gc.collect(host) == ()

    first = rows[0][0]
    done = run(elsewhere.config, "backup", "restore", first, "kept-again", "--trust", *repo)
    assert done.status == 0, done.err
    made = query.get(elsewhere, "kept-again").record
    facts = "cat /etc/machine-id; hostname; cat /root/link; test -e /etc/motd || echo gone; ls -d /root/new"
    found = run(elsewhere.config, "ssh", "kept-again", "--", facts).out.split()
    assert found == [made.uuid.hex, "kept-again", token, "gone", "/root/new"]
    data = f"{mount} cat /srv/data/file; stat -c %u:%g /root/owned"
    assert inside(elsewhere.config, "kept-again", data).split() == [token, "1000:2000"]
    assert made.host_key != subject.record.host_key
    lifecycle.delete(elsewhere, "kept-again")
    if image == "is there":
        images.delete(elsewhere, subject.record.spec.image)
    gc.collect(elsewhere)
    assert os.listdir(elsewhere.store.images) == []  # or the next one would not need that which it stored
