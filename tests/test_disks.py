"""Disks: what may be asked for, without a guest; and on real ones, plugged in, written, taken out, carried to another."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hvctl import gc, seed
from hvctl.config import Config
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import ids, loops
from hvctl.instances import create, disks, lifecycle, query, volumes
from hvctl.libvirtapi import domains
from hvctl.model import Instance, Mode, Spec, Wait
from hvctl.units import GIB, MIB
from tests import tiny, victims, world
from tests.cli import Ran, call, run, wait_for

pytestmark = pytest.mark.guest


def disk(settings: Config, *words: str) -> Ran:
    """`hvctl disk ...`, which must not fail."""
    done = call(settings, "disk", *words)
    assert done.status == 0, done
    return done


def sh(settings: Config, name: str, script: str) -> str:
    """What a shell line says inside; it must not fail."""
    done = run(settings, "exec", name, "--", "sh", "-ec", script)
    assert done.status == 0, done
    return done.out


@pytest.fixture
def stopped(host: Host, mode: Mode, tiny_image: str) -> Iterator[Instance]:
    """One of each mode that boots nothing; the world is as before afterwards."""
    before = world.look(host)
    yield create.create(host, create.Request(spec=tiny.make_spec("off", mode), start=False))
    if query.find(host, "off"):
        lifecycle.delete(host, "off")
    assert world.differences(before, world.look(host)) == []


VM, BOX = Mode.VM, Mode.CONTAINER


# Which mode, the words after `disk`, the exit code, and what is said.
REFUSED: tuple[tuple[Mode | None, str, int, str], ...] = (
    (None, "add off Data --size 1G", 7, "cannot be a name"),
    (None, "add off root --size 1G", 7, "root disk"),
    (None, "add off d --size 1K", 7, "too small"),
    (None, "add off d --size 1G --volume x", 2, "only a new disk"),
    (None, "add off d --volume nosuch", 3, "disk list --unattached"),
    (None, "add nobody d --size 1G", 3, "no instance"),
    (None, "remove off nosuch --yes", 3, "disk list off"),
    (None, "remove off root --yes", 2, "hvctl delete off"),
    (None, "move off nosuch off", 3, "disk list off"),
    (None, "move off root off", 2, "already; next: hvctl disk list off"),
    (None, "resize off nosuch 1G", 3, "disk list off"),
    (None, "delete nosuch --yes", 3, "disk list --unattached"),
    (VM, "resize off root none", 7, "without a size"),
    (VM, "add off d", 7, "--size"),
    (None, "add off d --size 1024P", 7, "not possible"),
    (VM, "add off d --size 1G --target /srv/d", 6, "host features"),
    (VM, "add off d --size 1G --format qcow2 --filesystem ext4", 6, "raw"),
    (VM, "add off d --size 1G --serial a,b", 7, "serial number"),
    (VM, "add off d --size 1G --serial root", 7, "serial number"),
    (VM, "add off d --device /dev/null", 7, "no block device"),
    (VM, "add off d --device /etc/passwd", 7, "not below /dev"),
    (VM, "add off d --iso /etc/nosuch.iso", 7, "does not exist"),
    (VM, "add off d --iso /etc/mtab", 7, "symbolic link"),
    (BOX, "add off d --size 1G --iops 5", 6, "host features"),
    (BOX, "add off d --device /dev/null", 6, "host features"),
    (BOX, "add off d --size 1G --format qcow2", 6, "host features"),
    (BOX, "add off d --size 1G --format directory", 6, "no size"),
    (BOX, "add off d --target /proc/x", 7, "the container's own"),
    (BOX, "add off d --target /usr/lib", 7, "would be hidden"),
    (BOX, "add off d --target ../x", 7, "no place"),
    (BOX, "add off d --target /srv/../etc", 7, "no place"),
    (BOX, "resize off root 20G", 6, "keeps no project quotas"),
    (BOX, "set off root --iops 5", 6, "host features"),
)


@pytest.mark.apart
def test_what_cannot_be_is_refused_and_nothing_has_changed(
    host: Host, settings: Config, mode: Mode, stopped: Instance
) -> None:
    before = world.look(host)
    for only, words, status, said in REFUSED:
        if only in (None, mode):
            done = call(settings, "disk", *words.split())
            assert (done.status, said in done.err, "Traceback" in done.err) == (status, True, False), (words, done)
    assert world.differences(before, world.look(host)) == []


@pytest.mark.apart
def test_a_disk_never_shrinks(settings: Config, mode: Mode, stopped: Instance) -> None:
    disk(settings, "add", "off", "data", "--size", "32M", "--filesystem", "ext4")
    done = run(settings, "disk", "resize", "off", "data", "16M")
    assert (done.status, "cannot shrink" in done.err) == (7, True)
    assert "already" in disk(settings, "resize", "off", "data", "32M").out
    assert "64MiB" in disk(settings, "resize", "off", "data", "64M").out
    done = run(settings, "disk", "resize", "off", "data", "900T")  # found before the record says so
    assert (done.status, "not possible" in done.err) == (7, True)
    assert "already" in disk(settings, "resize", "off", "data", "64M").out


@pytest.mark.apart
@pytest.mark.only_mode(Mode.CONTAINER, "a VM has no places")
def test_a_volume_keeps_the_place_that_somebody_gave_it(
    host: Host, settings: Config, mode: Mode, stopped: Instance
) -> None:
    create.create(host, create.Request(spec=tiny.make_spec("other", mode), start=False))
    disk(settings, "add", "off", "mail", "--target", "/var/mail")
    disk(settings, "add", "off", "data")
    assert "other: mail is at /var/mail" in disk(settings, "move", "off", "mail", "other").out
    assert "other: new is at /srv/new" in disk(settings, "move", "off", "data", "other", "--as", "new").out
    disk(settings, "add", "off", "box", "--target", "/var/mail")
    disk(settings, "remove", "other", "mail", "--keep")
    assert "off: mail is at /srv/mail" in disk(settings, "add", "off", "mail", "--volume", "mail").out
    lifecycle.delete(host, "other")


@pytest.mark.apart
@pytest.mark.only_mode(Mode.VM, "a container has a limit and no disk: test_quotas.py")
def test_the_root_of_a_stopped_vm_grows(host: Host, settings: Config, mode: Mode, stopped: Instance) -> None:
    disk(settings, "resize", "off", "root", "2G")
    path = host.store.layer_disk(stopped.record.layers[-1])
    words = ["qemu-img", "info", "--output=json", str(path)]
    assert json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["virtual-size"] == 2 * GIB
    assert query.get(host, "off").record.spec.disk_bytes == 2 * GIB
    done = run(settings, "disk", "resize", "off", "root", "1G")
    assert (done.status, "cannot shrink" in done.err) == (7, True)


@pytest.mark.apart
@pytest.mark.only_mode(Mode.VM, "qcow2 is no container's")
def test_a_qcow2_disk_is_described_as_it_was_asked_for(
    host: Host, settings: Config, mode: Mode, stopped: Instance
) -> None:
    words = "--size 64M --format qcow2 --cache none --no-discard --serial s-1 --iops 7"
    disk(settings, "add", "off", "data", *words.split())
    domain = ElementTree.fromstring(query.get_xml(host, query.get(host, "off")))
    element = domain.find("./devices/disk[serial='s-1']")
    assert element is not None
    driver = element.find("driver")
    assert driver is not None
    assert [driver.get(name) for name in ("type", "cache", "discard")] == ["qcow2", "none", "ignore"]
    assert element.findtext("iotune/total_iops_sec") == "7"
    disk(settings, "set", "off", "data", "--rate", "1M")
    domain = ElementTree.fromstring(query.get_xml(host, query.get(host, "off")))
    assert domain.findtext("./devices/disk[serial='s-1']/iotune/total_iops_sec") is None
    assert domain.findtext("./devices/disk[serial='s-1']/iotune/total_bytes_sec") == str(MIB)


@pytest.mark.apart
def test_the_list_has_the_root_and_what_was_added(settings: Config, mode: Mode, stopped: Instance) -> None:
    disk(settings, "add", "off", "data", "--size", "16M")
    root, data = json.loads(disk(settings, "list", "off", "--json").out)
    assert (root["name"], root["kind"], root["size_bytes"]) == ("root", "root", MIB if mode is VM else None)
    assert (data["name"], data["kind"], data["size_bytes"]) == ("data", "volume", 16 * MIB)
    table = disk(settings, "list").out
    assert [line.split()[1] for line in table.splitlines() if line.startswith("off ")] == ["root", "data"]


@pytest.mark.apart
def test_what_virsh_changed_stays_when_a_disk_comes_and_goes(
    host: Host, settings: Config, mode: Mode, stopped: Instance
) -> None:
    domain = domains.get(host.connection(mode), stopped.record.uuid)
    domains.define(host.connection(mode), domains.get_xml(domain).replace("</name>", "</name><title>mine</title>"))
    disk(settings, "add", "off", "data", "--size", "16M")
    disk(settings, "remove", "off", "data", "--yes")
    assert "<title>mine</title>" in domains.get_xml(domain)


@pytest.mark.apart
def test_a_deleted_instance_takes_its_volumes_along_unless_told(
    host: Host, settings: Config, mode: Mode, stopped: Instance
) -> None:
    disk(settings, "add", "off", "data", "--size", "16M", "--filesystem", "ext4")
    assert run(settings, "delete", "off", "--yes", "--keep-volumes").status == 0
    (kept,) = volumes.list_unattached(host)
    assert (kept.disk.name, kept.last_owner, kept.disk.size_bytes) == ("data", "off", 16 * MIB)
    assert gc.collect(host, orphans=True) == ()  # kept by somebody, so nobody's rubbish
    assert "data" in disk(settings, "list", "--unattached").out
    assert run(settings, "disk", "delete", "data").status == 2  # without a terminal it wants --yes
    disk(settings, "delete", "data", "--yes")
    assert volumes.list_unattached(host) == []


@pytest.mark.apart
def test_a_volume_that_was_half_made_is_an_orphan(host: Host, stopped: Instance) -> None:
    folder = host.store.volumes / "00000000-0000-4000-8000-00000000000a"
    folder.mkdir()
    assert [item.is_done for item in gc.collect(host)] == [False]
    assert [item.is_done for item in gc.collect(host, orphans=True)] == [True]
    assert not folder.exists()


@pytest.mark.apart
def test_two_volumes_of_one_name_are_told_apart_by_their_identifiers(
    host: Host, settings: Config, mode: Mode, stopped: Instance
) -> None:
    for _time in range(2):
        disk(settings, "add", "off", "data", "--size", "16M")
        disk(settings, "remove", "off", "data", "--keep")
    first, second = volumes.list_unattached(host)
    done = run(settings, "disk", "add", "off", "data", "--volume", "data")
    assert (done.status, first.id[:8] in done.err, second.id[:8] in done.err) == (7, True, True)
    disk(settings, "add", "off", "data", "--volume", second.id[:8])
    disk(settings, "delete", "data", "--yes")
    assert [item.volume for item in query.get(host, "off").record.disks] == [second.id]


@pytest.fixture(scope="module")
def vm(host: Host, debian_image: str) -> Iterator[Instance]:
    """A VM that runs, shared."""
    spec = Spec(name="disky", mode=Mode.VM, image=debian_image, cpus=2, memory_bytes=512 * MIB)
    yield create.create(host, create.Request(spec=spec, wait=Wait.AGENT))
    lifecycle.delete(host, "disky")


@pytest.fixture(scope="module")
def boxes(host: Host, debian_image: str) -> Iterator[tuple[Instance, Instance]]:
    """Two containers that run, each with ids of its own, shared."""
    made = []
    for name in ("box", "other"):
        spec = Spec(name=name, mode=Mode.CONTAINER, image=debian_image, memory_bytes=256 * MIB)
        made.append(create.create(host, create.Request(spec=spec)))
    yield made[0], made[1]
    for name in ("box", "other"):
        lifecycle.delete(host, name)


def by_serial(serial: str) -> str:
    """A shell line that waits until the guest's udev has found the disk."""
    path = f"/dev/disk/by-id/virtio-{serial}"
    return f"n=0; until [ -e {path} ] || [ $n = 100 ]; do sleep 0.1; n=$((n+1)); done; D={path}; "


def names_inside(settings: Config, name: str) -> list[str]:
    return sh(settings, name, "ls /sys/block").split()


def test_a_disk_comes_and_goes_while_the_vm_runs_and_keeps_its_content(
    host: Host, settings: Config, vm: Instance, boxes: tuple[Instance, Instance], tiny_image: str
) -> None:
    words = "--size 64M --filesystem ext4 --iops 500 --rate 50M"
    assert "virtio-data" in disk(settings, "add", "disky", "data", *words.split()).out
    sh(settings, "disky", by_serial("data") + "mount $D /mnt; echo kept > /mnt/file; sync")
    live = ElementTree.fromstring(domains.get_xml(domains.get(host.connection(VM), vm.record.uuid), inactive=False))
    assert live.findtext("./devices/disk[serial='data']/iotune/total_iops_sec") == "500"
    assert live.findtext("./devices/disk[serial='data']/iotune/total_bytes_sec") == str(50 * MIB)
    disk(settings, "set", "disky", "data")
    live = ElementTree.fromstring(domains.get_xml(domains.get(host.connection(VM), vm.record.uuid), inactive=False))
    assert live.findtext("./devices/disk[serial='data']/iotune/total_iops_sec") in (None, "0")

    refused = run(settings, "disk", "remove", "disky", "data", "--keep")
    assert (refused.status, "mounted at /mnt" in refused.err) == (5, True)
    disk(settings, "resize", "disky", "data", "128M")
    until_grown = "until [ $(cat /sys/block/vdb/size) = 262144 ]; do sleep 0.1; done"
    sh(settings, "disky", f"{until_grown}; resize2fs /dev/vdb 2>&1; umount /mnt")

    (volume,) = query.get(host, "disky").record.disks
    path = host.store.volume_content(volume.volume, volume.format)
    assert path.stat().st_uid != 0  # the qemu user's, while it has it
    disk(settings, "remove", "disky", "data", "--keep")
    assert "vdb" not in names_inside(settings, "disky")
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o600)

    # By way of one that is off back into the one that runs, and on from there. That one boots with such a disk is in
    # test_backups_guest.py.
    create.create(host, create.Request(spec=tiny.make_spec("second"), start=False))
    try:
        disk(settings, "add", "second", "copy", "--volume", "data")
        disk(settings, "move", "second", "copy", "disky")
        assert query.get(host, "second").record.disks == ()
    finally:
        lifecycle.delete(host, "second")
    read = by_serial("copy") + "mount $D /mnt; cat /mnt/file; umount /mnt"
    assert sh(settings, "disky", read) == "kept\n"
    refused = run(settings, "disk", "move", "disky", "copy", "box")
    assert (refused.status, "--trust" in refused.err) == (6, True)
    assert [item.name for item in query.get(host, "disky").record.disks] == ["copy"]
    disk(settings, "move", "disky", "copy", "box", "--as", "data", "--trust")
    assert sh(settings, "box", "cat /srv/data/file; stat -c %u /srv/data/file") == "kept\n0\n"
    assert "vdb" not in names_inside(settings, "disky")
    disk(settings, "remove", "box", "data", "--yes")
    assert not path.exists()


def test_the_root_grows_live_with_the_file_system_in_it(host: Host, settings: Config, vm: Instance) -> None:
    before = int(sh(settings, "disky", "df --output=size -B1 / | tail -1"))
    size_bytes = disks.list_disks(host, vm)[0].size_bytes + GIB
    done = json.loads(disk(settings, "resize", "disky", "root", str(size_bytes), "--json").out)
    assert (done["changed"], done["grown_inside"]) == (True, True)
    assert int(sh(settings, "disky", "df --output=size -B1 / | tail -1")) > before + 900 * MIB
    assert json.loads(disk(settings, "resize", "disky", "root", str(size_bytes), "--json").out)["changed"] is False


def test_an_iso_image_is_read_and_stays_whose_it_was(
    settings: Config, vm: Instance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Path(f"/srv/hvctl-test-{settings.network}.iso")
    path.write_bytes(seed.make_iso({"readme": b"from the iso\n"}))
    path.chmod(0o600)
    try:
        refused = run(settings, "disk", "add", "disky", "cd", "--iso", str(path))
        assert (refused.status, "chmod o+r" in refused.err) == (8, True)
        path.chmod(0o644)
        disk(settings, "add", "disky", "cd", "--iso", str(path))
        assert path.stat().st_uid == 0
        read = by_serial("cd") + "mount -o ro $D /mnt; cat /mnt/*; umount /mnt; blockdev --getro $D"
        assert sh(settings, "disky", read) == "from the iso\n1\n"
        disk(settings, "remove", "disky", "cd", "--yes")
        assert path.exists()
    finally:
        path.unlink()


def test_a_device_of_the_host_is_lent_and_given_back(
    host: Host, settings: Config, vm: Instance, tmp_path: Path
) -> None:
    (tmp_path / "backing").write_bytes(bytes(16 * MIB))
    words = ["losetup", "--find", "--show", str(tmp_path / "backing")]
    device = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    try:
        disk(settings, "add", "disky", "lent", "--device", device)
        sh(settings, "disky", by_serial("lent") + "printf written | dd of=$D conv=notrunc,fsync status=none")
        again = run(settings, "disk", "add", "disky", "twice", "--device", device)
        assert (again.status, "is a disk of 'disky'" in again.err) == (5, True)
        assert run(settings, "disk", "resize", "disky", "lent", "1G").status == 6
        disk(settings, "remove", "disky", "lent", "--yes")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert (tmp_path / "backing").read_bytes()[:7] == b"written"


def _add(host: Host, name: str, events: Sink) -> object:
    return disks.add(host, name, disks.DiskRequest(name="cut", size_bytes=16 * MIB), events=events)


def _remove(host: Host, name: str, events: Sink) -> object:
    return disks.remove(host, name, "cut", events=events)


def test_a_kill_between_the_guest_and_the_record_is_settled(host: Host, settings: Config, vm: Instance) -> None:
    """The guest has the disk, the definition does not yet: gc takes it out. And the other way round: gc puts it in."""
    victims.die_at(settings, _add, "disk-add", "define", "disky")
    assert is_plugged(host, vm)
    assert [item.action for item in gc.collect(host)] == ["undid disk-add"]
    assert "vdb" not in names_inside(settings, "disky")
    assert query.get(host, "disky").record.disks == ()
    assert files_of_volumes(host) == []
    _add(host, "disky", lambda _event: None)
    victims.die_at(settings, _remove, "disk-remove", "define", "disky")
    assert not is_plugged(host, vm)
    assert [item.action for item in gc.collect(host)] == ["undid disk-remove"]
    sh(settings, "disky", by_serial("cut") + "test -b $D")
    victims.die_at(settings, _remove, "disk-remove", "volume", "disky")
    assert [item.action for item in gc.collect(host)] == ["finished disk-remove"]
    assert files_of_volumes(host) == []


def is_plugged(host: Host, vm: Instance) -> bool:
    """Whether the running VM has the disk, by libvirt's word: into an incomplete one hvctl does not go."""
    return "<serial>cut</serial>" in domains.get_xml(domains.get(host.connection(VM), vm.record.uuid), inactive=False)


def files_of_volumes(host: Host) -> list[str]:
    return [path.name for path in host.store.volumes.iterdir()]


def test_a_container_gets_a_directory_and_passes_it_on_with_its_owners(
    host: Host, settings: Config, boxes: tuple[Instance, Instance]
) -> None:
    assert "/srv/shared" in disk(settings, "add", "box", "shared").out
    sh(settings, "box", "cd /srv/shared; echo of box > file; touch users; chown 1000:1000 users; chmod 4755 users")
    (volume,) = query.get(host, "box").record.disks
    content = host.store.volume_content(volume.volume, volume.format)
    assert [(content / name).stat().st_uid for name in ("file", "users")] == [0, 1000]
    assert content.parent.stat().st_mode & 0o777 == 0o700  # nobody else comes to that setuid program

    sh(settings, "box", "cd /srv/shared; sleep 1000 > /dev/null 2>&1 &")
    assert run(settings, "disk", "move", "box", "shared", "other").status == 5
    sh(settings, "box", "pkill sleep; while pgrep sleep > /dev/null; do :; done")
    disk(settings, "move", "box", "shared", "other", "--target", "/data")
    assert run(settings, "exec", "box", "--", "ls", "/srv/shared").out == ""
    assert sh(settings, "other", "cd /data; cat file; stat -c %u:%g file users") == "of box\n0:0\n1000:1000\n"
    first_ids = {box.record.first_id for box in boxes}
    assert len(first_ids) == 2
    assert all(first is not None and first % ids.COUNT == 0 for first in first_ids)

    sh(settings, "other", "touch /run/before")
    run(settings, "exec", "other", "--", "systemctl", "reboot")  # which may end before it can tell how that went
    wait_for(lambda: run(settings, "exec", "other", "--", "test", "!", "-e", "/run/before").status == 0)
    assert sh(settings, "other", "cat /data/file") == "of box\n"  # libvirt has started it as it was, without
    lifecycle.stop(host, "other")
    lifecycle.start(host, "other")
    assert sh(settings, "other", "cat /data/file") == "of box\n"
    disk(settings, "remove", "other", "shared", "--yes")
    assert run(settings, "exec", "other", "--", "ls", "/data").out == ""
    assert files_of_volumes(host) == []


def test_a_volume_of_a_size_is_full_at_that_size_and_grows(
    host: Host, settings: Config, boxes: tuple[Instance, Instance]
) -> None:
    disk(settings, "add", "box", "small", "--size", "32M")
    sh(settings, "box", "mkdir -p /srv/small; ! head -c 64M /dev/zero > /srv/small/big 2>/dev/null; rm /srv/small/big")
    assert 20 * MIB < int(sh(settings, "box", "df --output=size -B1 /srv/small | tail -1")) <= 32 * MIB
    refused = run(settings, "disk", "resize", "box", "small", "96M")
    assert (refused.status, "hvctl stop box" in refused.err) == (5, True)
    refused = run(settings, "disk", "resize", "box", "small", "16M")  # no reason to stop it
    assert (refused.status, "cannot shrink" in refused.err) == (7, True)
    lifecycle.stop(host, "box")
    disk(settings, "resize", "box", "small", "96M")
    lifecycle.start(host, "box")
    assert int(sh(settings, "box", "df --output=size -B1 /srv/small | tail -1")) > 80 * MIB
    lifecycle.restart(host, "other")  # it has a copy of all mounts now
    (volume,) = query.get(host, "box").record.disks
    path = host.store.volume_content(volume.volume, volume.format)
    assert loops.find_loop(path) is not None
    refused = run(settings, "disk", "remove", "box", "small", "--keep")
    assert (refused.status, "hvctl stop box" in refused.err) == (5, True)
    sh(settings, "box", "touch /srv/small/still-there")
    lifecycle.stop(host, "box")
    wait_for(lambda: loops.find_loop(path) is None)  # it goes with the last who has it open, udev for a moment
    assert loops.find_loop(path) is None  # only so may another one write to it
    disk(settings, "remove", "box", "small", "--keep")
    lifecycle.start(host, "box")
    disk(settings, "add", "box", "small", "--volume", "small")
    sh(settings, "box", "test -e /srv/small/still-there")
    disk(settings, "remove", "box", "small", "--yes")  # what came while it ran goes while it runs
    wait_for(lambda: loops.find_loop(path) is None)
    assert loops.find_loop(path) is None


def test_a_container_cannot_make_a_read_only_volume_writable(
    host: Host, settings: Config, boxes: tuple[Instance, Instance]
) -> None:
    added = disk(settings, "add", "box", "fixed", "--read-only").out
    assert "hvctl restart box" in added
    lifecycle.restart(host, "box")
    tried = run(settings, "exec", "box", "--", "sh", "-c", "mount -o remount,bind,rw /srv/fixed; touch /srv/fixed/x")
    assert tried.status != 0
    assert sh(settings, "box", "ls /srv/fixed") == ""
    lifecycle.stop(host, "box")
    disk(settings, "remove", "box", "fixed", "--yes")
    lifecycle.start(host, "box")
