"""The size of a container's root: what its file system cannot hold is refused, and what it can does hold.

The latter needs a kernel with project quotas, which not every one has that tests run on: scripts/test-hosts has two.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.access.agent import ExecResult
from hvctl.backends import rootlimits
from hvctl.cli.present import as_pairs
from hvctl.config import Config
from hvctl.host import Host
from hvctl.hostsetup import directories
from hvctl.hostside import quotas
from hvctl.instances import convert, disks, enter, lifecycle, query
from hvctl.instances import create as making
from hvctl.model import Mode, Record
from hvctl.units import GIB, MIB
from tests import sessions, stores, tiny, world
from tests.cli import Ran, call

pytestmark = pytest.mark.guest

MAKE = {
    "ext4": ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "project,quota"],
    "plain ext4": ["mke2fs", "-q", "-F", "-t", "ext4"],
    "xfs": ["mkfs.xfs", "-q"],
}


def _mounted(settings: Config, kind: str, options: str) -> Iterator[Host]:
    """A host whose store is a file system of its own."""
    store = sessions.small_store(settings)
    disk = store.with_suffix(".raw")
    store.mkdir(mode=0o711)
    try:
        with disk.open("wb") as stream:
            stream.truncate(2 * GIB)
        subprocess.run([*MAKE[kind], str(disk)], check=True, capture_output=True, timeout=60)
        mounted = subprocess.run(["mount", "-o", options, disk, store], capture_output=True, timeout=60, check=False)
        if mounted.returncode != 0 or ("prjquota" in options and not quotas.is_enforced(store)):
            pytest.skip("this kernel keeps no project quotas")
        store.chmod(0o711)
        with Host(replace(settings, store=store)) as host:
            for change in directories.missing(host):
                change.apply()
            yield host
            for instance in host.instances():
                lifecycle.delete(host, instance.name)
    finally:
        subprocess.run(["umount", str(store)], capture_output=True, timeout=60, check=False)
        disk.unlink(missing_ok=True)
        store.rmdir()


@pytest.fixture(params=["plain ext4", "xfs"])
def unlimited(host: Host, settings: Config, request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host whose store is on a file system that is mounted without quotas."""
    yield from _mounted(settings, request.param, "loop")


@pytest.fixture(params=["ext4", "xfs"])
def limiting(host: Host, settings: Config, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    """A host whose store is on a file system with project quotas, and which has the image `alike`: a busybox."""
    for limiting in _mounted(settings, request.param, "loop,prjquota"):
        (tmp_path / "root.tar.gz").write_bytes(stores.make_busybox_tree())
        assert call(limiting.config, "image", "import", str(tmp_path / "root.tar.gz"), "--name", "alike").status == 0
        yield limiting


def create(host: Host, name: str, *words: str) -> Ran:
    return call(host.config, "create", name, "--container", "--image", "alike", "--memory", "256M", *words)


def sh(host: Host, name: str, script: str) -> ExecResult:
    return enter.exec_(host, name, ["sh", "-c", script], b"")


def size_inside(host: Host, name: str) -> int:
    """Bytes that `df /` says there are."""
    *_head, line = sh(host, name, "df -k /").stdout.decode().splitlines()
    return int(line.split()[1]) * 1024


def write(host: Host, name: str, count: int) -> int:
    """Try to write so many MiB to one new file; how many there are."""
    sh(host, name, f"rm -f /root/big; sync; dd if=/dev/zero of=/root/big bs=1M count={count}; sync")
    return int(sh(host, name, "stat -c %s /root/big").stdout) // MIB


def record_of(host: Host, name: str) -> Record:
    return query.get(host, name).record


@pytest.mark.apart
def test_a_size_that_cannot_be_held_is_refused_with_the_reason(unlimited: Host, request: pytest.FixtureRequest) -> None:
    settings = unlimited.config
    stores_before = world.look(unlimited)
    kind = request.node.callspec.params["unlimited"].split()[-1]
    cure = {"ext4": "tune2fs -O project,quota /dev/loop", "xfs": "with the option prjquota"}[kind]
    assert rootlimits.find_obstacle(unlimited).endswith(" keeps no project quotas")
    assert f"({kind} on /dev/loop" in rootlimits.find_obstacle(unlimited)
    assert cure in rootlimits.find_cure(unlimited)
    assert world.differences(stores_before, world.look(unlimited)) == []
    assert call(settings, "host", "doctor").out.count("roots of containers have no size") == 1


@pytest.mark.apart
@pytest.mark.parametrize(
    ("found", "cure"),
    [
        (("ext4", "/dev/vda", "/"), "a file system of its own"),
        (("xfs", "/dev/vda", "/"), "a file system of its own"),
        (("ext4", "/dev/vdb", "/var/lib/hvctl"), "unmount /dev/vdb, tune2fs -O project,quota /dev/vdb"),
        (("overlay", "overlay", "/"), "hvctl disk add NAME data"),
    ],
)
def test_the_root_of_the_host_is_not_to_be_unmounted(
    host: Host, monkeypatch: pytest.MonkeyPatch, found: tuple[str, str, str], cure: str
) -> None:
    monkeypatch.setattr(rootlimits, "_find_file_system", lambda _host: found)
    assert cure in rootlimits.find_cure(host)


def test_a_container_cannot_write_more_than_its_size(limiting: Host) -> None:
    assert create(limiting, "free").status == 0
    done = create(limiting, "box", "--disk", "64MiB")
    assert done.status == 0, done.err
    assert size_inside(limiting, "box") == 64 * MIB
    assert 50 < write(limiting, "box", 100) <= 64
    assert sh(limiting, "box", "touch /root/more && echo x > /root/more").status != 0
    # Another one has its own, or none.
    assert size_inside(limiting, "free") > GIB
    assert write(limiting, "free", 100) == 100
    assert create(limiting, "other", "--disk", "64MiB").status == 0
    assert write(limiting, "other", 40) == 40


def test_the_size_changes_while_it_runs(limiting: Host) -> None:
    settings = limiting.config
    assert create(limiting, "box").status == 0
    record = record_of(limiting, "box")
    assert rootlimits.find(limiting, record) == 0
    assert write(limiting, "box", 100) == 100
    refused = call(settings, "disk", "resize", "box", "root", "64M")
    assert (refused.status, "has written 100" in refused.err) == (7, True), refused
    assert size_inside(limiting, "box") > GIB
    for size_mib in (128, 256, 192):
        done = call(settings, "disk", "resize", "box", "root", f"{size_mib}M")
        assert (done.status, f"{size_mib}MiB" in done.out) == (0, True), done
        assert size_inside(limiting, "box") == size_mib * MIB
        assert size_mib - 20 < write(limiting, "box", 300) <= size_mib
        assert write(limiting, "box", 100) == 100
    instance = query.get(limiting, "box")
    root, *_others = disks.list_disks(limiting, instance)
    assert root.size_bytes == 192 * MIB
    assert ("disk", "192MiB") in as_pairs(instance, root.size_bytes)
    assert call(settings, "disk", "list", "box").out.count("192MiB") == 1


def test_new_layers_are_limited_too(limiting: Host) -> None:
    """A restart, a snapshot of one that is off, a revert, a copy."""
    settings = limiting.config
    assert create(limiting, "box", "--disk", "64M").status == 0
    assert write(limiting, "box", 30) == 30
    for line in (
        "restart box --force",
        "snapshot take box running",
        "stop box --force",
        "snapshot take box off",
        "disk resize box root 100M",
        "start box",
    ):
        done = call(settings, *line.split())
        assert done.status == 0, done
    assert size_inside(limiting, "box") == 100 * MIB
    assert write(limiting, "box", 200) <= 100
    for name, line in (("box", "snapshot revert box off --yes --force"), ("twin", "copy box@running twin")):
        done = call(settings, *line.split())
        assert done.status == 0, done
        assert size_inside(limiting, name) == 64 * MIB
        assert write(limiting, name, 100) <= 64


def test_a_limit_can_be_taken_away(limiting: Host) -> None:
    settings = limiting.config
    assert create(limiting, "box", "--disk", "64M").status == 0
    done = call(settings, "disk", "resize", "box", "root", "none")
    assert (done.status, done.out) == (0, "box: root has no limit\n"), done
    assert write(limiting, "box", 100) == 100
    assert call(settings, "restart", "box", "--force").status == 0
    assert size_inside(limiting, "box") > GIB
    assert rootlimits.find(limiting, record_of(limiting, "box")) == 0


def limit_of(host: Host, record: Record) -> int:
    """What its file system holds the writable layer to, in bytes."""
    return quotas.get_limit(host.store.layers, quotas.find_project(host.store.layer(record.layers[-1])))


def test_what_was_a_vm_is_held_to_the_size_of_its_disk(limiting: Host) -> None:
    """And is a VM with a disk of that size again; one of less than 1 GiB would grow. It has no init: its start fails later."""
    spec = replace(tiny.make_spec("box", Mode.VM, tiny.publish_root(limiting, "tiny-root")), disk_bytes=64 * MIB)
    making.create(limiting, making.Request(spec=spec, start=False))
    assert convert.convert(limiting, convert.Request(name="box", mode=Mode.CONTAINER)).is_changed
    record = record_of(limiting, "box")
    assert (record.mode, rootlimits.find(limiting, record)) == (Mode.CONTAINER, 64 * MIB)
    call(limiting.config, "start", "box", "--wait", "running")
    assert limit_of(limiting, record) == 64 * MIB
    call(limiting.config, "stop", "box", "--force")
    done = call(limiting.config, "disk", "resize", "box", "root", "1536M")
    assert done.status == 0, done
    assert limit_of(limiting, record) == 1536 * MIB
    assert convert.convert(limiting, convert.Request(name="box", mode=Mode.VM)).is_changed
    root, *_others = disks.list_disks(limiting, query.get(limiting, "box"))
    assert root.size_bytes == 1536 * MIB


def test_a_deleted_one_leaves_no_limit(limiting: Host) -> None:
    assert create(limiting, "box", "--disk", "64M").status == 0
    record = record_of(limiting, "box")
    project = quotas.find_project(limiting.store.layer(record.layers[-1]))
    assert limit_of(limiting, record) == 64 * MIB
    lifecycle.delete(limiting, "box")
    assert quotas.get_limit(limiting.store.layers, project) == 0
