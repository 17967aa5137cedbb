"""Disks and root trees of the user's own: recognised by content, bounded, refused in one line, killed, out of space."""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import lzma
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvctl import images
from hvctl.config import Config
from hvctl.errors import HvctlError, NotFound
from hvctl.events import Event, Note, Progress
from hvctl.host import Host
from hvctl.hostside import download
from hvctl.model import Firmware, Provision
from hvctl.rootfs import published
from hvctl.rootfs.sources import Wanted
from hvctl.units import GIB, MIB
from tests import cli, stores, victims, website
from tests.stores import pull as bring
from tests.stores import refuse
from tests.website import Site


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return stores.make(tmp_path)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    with website.serve() as site:
        yield site


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.make_disk(tmp_path_factory.mktemp("disk"))


def zstd(content: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True, timeout=60).stdout


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstd,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_disk_is_recognised_by_its_content(
    host: Host, disk: Path, tmp_path: Path, kind: str, compression: str
) -> None:
    plain = disk if kind == "qcow2" else disk.with_name(f"{disk.name}.raw")
    file = tmp_path / "x.iso"
    file.write_bytes(COMPRESSIONS[compression](plain.read_bytes()))
    image = bring(host, file, login_user="tess", firmware=Firmware.UEFI)
    assert image.disk is not None
    assert (image.disk.format, image.disk.virtual_bytes) == ("qcow2", 8 * MIB)
    assert (image.login_user, image.firmware, image.provision) == ("tess", Firmware.UEFI, Provision.NOCLOUD)
    made = host.store.image(image.id) / "disk.qcow2"
    assert made.stat().st_mode & 0o777 == 0o444
    words = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", f"{disk}.raw", str(made)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def test_the_same_content_is_one_image_with_two_names(host: Host, disk: Path) -> None:
    told: list[Event] = []
    first, second = bring(host, disk, "one"), bring(host, disk.with_name(f"{disk.name}.raw"), "two", told)
    assert first.id == second.id
    assert Note("two", "the same content as one: one image, kept once") in told
    assert published.list_ids(host) == (first.id,)


def test_a_file_that_only_its_owner_may_read_is_imported(host: Host, disk: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.img"
    file.write_bytes(disk.read_bytes())
    file.chmod(0o600)
    os.chown(file, 12345, 12345)
    assert bring(host, file).disk is not None


def test_something_that_is_no_disk_is_not_taken_for_one(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("# read me\n" * 100)
    refuse(host, "neither a disk nor the archive", file)
    assert bring(host, file, format="raw").disk is not None


@pytest.mark.parametrize("make", ["missing", "directory", "empty", "fifo"])
def test_something_that_is_no_file_is_refused(host: Host, tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    {"missing": lambda: None, "directory": path.mkdir, "empty": path.touch, "fifo": lambda: os.mkfifo(path)}[make]()
    refuse(host, "(no file|neither a disk)", path, HvctlError)


def test_a_disk_that_names_another_file_is_refused(host: Host, disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(disk), str(path)]
    subprocess.run(words, check=True, timeout=60)
    refuse(host, "backing file", path)


def test_a_compressed_disk_that_is_cut_short_is_refused(host: Host, disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.xz"
    path.write_bytes(lzma.compress(disk.read_bytes())[:-100])
    refuse(host, "cannot be expanded|cut short", path)


@pytest.mark.apart
@pytest.mark.guest  # no guest, but a process of its own, or seconds
def test_a_bomb_is_refused(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "bomb.zst"
    words = ["zstd", "-q", "-1", "-o", str(path)]
    subprocess.run(words, input=bytes(510) + b"\x55\xaa" + bytes(400 * MIB), check=True, timeout=120)
    refuse(host, "expands to more than", path)


def test_a_tree_becomes_an_image_for_containers(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(stores.make_tree({"etc/hello": b"hello"}))
    image = bring(host, path)
    assert (image.os, image.version, image.provision) == ("tiny", "3", Provision.NONE)
    assert image.disk is None and image.has_tree
    assert image.tree_digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert (host.store.image_tree(image.id) / "etc/hello").read_bytes() == b"hello"
    assert host.store.image_tree(image.id).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", ["w:", "w:xz", "w:bz2"])
def test_a_tree_may_be_compressed_in_any_way(host: Host, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(stores.make_tree({}, mode=mode))
    assert bring(host, path).has_tree


def steps(told: list[Event], task: str) -> list[float]:
    """How far a task said that it was, as shares of all its bytes."""
    found = [event for event in told if isinstance(event, Progress) and event.task == task]
    assert all(event.is_bytes for event in found)
    return [event.done / event.total for event in found]


def test_a_bar_moves_while_a_disk_is_copied(host: Host, tmp_path: Path) -> None:
    told: list[Event] = []
    (tmp_path / "disk").write_bytes(bytes(510) + b"\x55\xaa" + os.urandom(24 * MIB))
    bring(host, tmp_path / "disk", told=told)
    shares = steps(told, "copying the disk")
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert any(0 < share < 1 for share in shares)  # how many there are is the machine's to say


def test_a_bar_moves_while_a_squashfs_is_unpacked(host: Host, tmp_path: Path) -> None:
    told: list[Event] = []
    (tmp_path / "tree/sbin").mkdir(parents=True)
    (tmp_path / "tree/sbin/init").write_text("#!/bin/sh\n")
    for number in range(6):
        (tmp_path / f"tree/{number}").write_bytes(bytes([number]) * 20 * MIB)
    words = ["mksquashfs", str(tmp_path / "tree"), str(tmp_path / "x.squashfs"), "-quiet"]
    subprocess.run(words, check=True, timeout=60, capture_output=True)
    bring(host, tmp_path / "x.squashfs", told=told)
    shares = steps(told, "unpacking")
    assert shares == sorted(shares)
    assert len([share for share in shares if 0 < share < 1]) > 3


def test_a_squashfs_is_a_tree(host: Host, tmp_path: Path) -> None:
    for name, content in {"etc/os-release": b"ID=tiny\n", "sbin/init": b"#!/bin/sh\n"}.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True)
        (tmp_path / "tree" / name).write_bytes(content)
    path = tmp_path / "x.squashfs"
    subprocess.run(
        ["mksquashfs", str(tmp_path / "tree"), str(path), "-quiet"], check=True, timeout=60, capture_output=True
    )
    image = bring(host, path)
    assert (image.os, image.version, image.has_tree) == ("tiny", "", True)


@pytest.mark.parametrize(
    ("name", "provision"),
    [("usr/bin/cloud-init", Provision.NOCLOUD), ("usr/lib/hvctl/identity", Provision.CREDENTIALS)],
)
def test_a_tree_with_a_way_to_set_it_up_gets_that(host: Host, tmp_path: Path, name: str, provision: Provision) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(stores.make_tree({name: b"#!/usr/bin/python3\n"}))
    assert bring(host, path).provision is provision


def test_a_tree_without_an_init_is_no_system(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(stores.make_tree({"sbin/init": None}))  # type: ignore[dict-item]
    refuse(host, "no /sbin/init", path)


def test_a_tree_for_another_machine_is_refused(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(stores.make_tree({"sbin/init": b"\x7fELF" + bytes(14) + b"\xb7\0" + bytes(44)}))
    refuse(host, "for aarch64", path)


@pytest.mark.parametrize(
    "text", [b"ID=$(touch /canary)\n", b"ID=\xff\n", b"", b"ID=" + b"x" * 100, b"ID='a b'\nVERSION_ID=\0"]
)
def test_an_odd_os_release_is_no_word(host: Host, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(stores.make_tree({"etc/os-release": text}))
    image = bring(host, path)
    assert (image.os, image.version) == ("unknown", "")


def test_an_address_needs_a_digest(host: Host, site: Site, disk: Path) -> None:
    site.files["/x"] = disk.read_bytes()
    digest = hashlib.sha256(disk.read_bytes()).hexdigest()
    refuse(host, "nothing says what", site.url("/x"))
    assert site.asked == []
    refuse(host, "is not what it should be", site.url("/x"), sha256="0" * 64)
    told: list[Event] = []
    image = bring(host, site.url("/x"), sha256=digest, told=told)
    assert [event for event in told if isinstance(event, Note)] == []
    assert bring(host, site.url("/x"), name="again", sha256=f"sha256:{digest}").id == image.id
    assert len(site.asked) == 2
    bring(host, site.url("/x"), told=told, is_insecure=True)
    assert any("not verified" in event.text for event in told if isinstance(event, Note))


@pytest.mark.parametrize("text", ["x", "0" * 63, "0" * 65, "g" * 64, "md5:" + "0" * 32, "sha512:" + "0" * 64, "-" * 64])
def test_a_digest_is_a_digest(host: Host, disk: Path, text: str) -> None:
    refuse(host, "is no SHA-256 digest", disk, sha256=text)


def test_a_file_must_have_the_digest_that_is_given(host: Host, disk: Path) -> None:
    refuse(host, "is not what it should be", disk, sha256="0" * 64)
    assert disk.exists()


@pytest.mark.parametrize("user", ["-x", "a b", "A", "x" * 40, "a;b"])
def test_a_user_is_a_name(host: Host, disk: Path, user: str) -> None:
    refuse(host, "no name of a user", disk, login_user=user)


@pytest.mark.apart
@pytest.mark.guest  # no guest, but a process of its own, or seconds
def test_prune_says_what_it_would_and_does_it(host: Host, site: Site, disk: Path, tmp_path: Path) -> None:
    def hvctl(*words: str) -> str:
        done = cli.run(host.config, "image", *words)
        assert done.status == 0, done.err
        return done.out

    image = bring(host, disk, "old")
    (host.store.tags / "old").unlink()
    site.files["/x"], site.cuts["/x"] = os.urandom(100_000), [50_000, 0, 0, 0]
    with pytest.raises(HvctlError):
        bring(host, site.url("/x"), is_insecure=True)
    said = hvctl("prune", "--dry-run")
    assert f"image {image.id[:12]}" in said and "download" in said and "would be removed" in said
    assert host.store.image(image.id).exists() and list(host.store.downloads.glob("*.part"))
    assert hvctl("prune").count("removed") == 2
    assert not host.store.image(image.id).exists() and list(host.store.downloads.iterdir()) == []
    assert hvctl("prune") == "nothing to do\n"


@pytest.mark.apart
@pytest.mark.guest  # no guest, but a process of its own, or seconds
def test_the_command_line_takes_a_relative_path(host: Host, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk.parent)
    done = cli.run(host.config, "image", "import", disk.name, "--name", "mine", "--firmware", "uefi")
    assert done.status == 0, done.err
    assert "next: hvctl create web --image mine" in done.out
    assert published.get_image(host, "mine").firmware is Firmware.UEFI
    done = cli.run(host.config, "image", "import", "nothing.img", "--name", "mine")
    assert (done.status, done.err.count("\n")) == (NotFound.code, 1)


STEPS = ("downloading", "checking the disk", "copying the disk", "unpacking", "publishing")


def _die_at(task: str, source: str, host: Host, name: str) -> object:
    def kill(event: Event) -> None:
        if isinstance(event, Progress) and event.task == task:
            os.kill(os.getpid(), 9)

    return images.bring(host, Wanted(name=name, source=source, is_insecure=True), kill)


@pytest.mark.apart
@pytest.mark.guest  # no guest, but a process of its own, or seconds
@pytest.mark.parametrize("task", STEPS)
def test_killed_at_any_step_nothing_but_what_gc_takes_is_left(host: Host, site: Site, disk: Path, task: str) -> None:
    site.files["/x"] = stores.make_tree({}) if task == "unpacking" else disk.read_bytes()
    before = stores.content(host)
    victims.die_in(host.config, functools.partial(_die_at, task, site.url("/x")), "x")
    assert published.list_tags(host) == ()
    done = cli.run(host.config, "gc")
    assert done.status == 0, done.err
    assert stores.content(host) == before
    bring(host, site.url("/x"), is_insecure=True)
    last = site.asked[-1]
    if task == "downloading":
        assert int(last.range[6:-1]) + last.sent_bytes == len(site.files["/x"])
    else:
        assert last.status == 416  # it was whole


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[int], Host]]:
    """Makes stores on file systems of a given size."""
    mounted = []

    def make(size_bytes: int) -> Host:
        folder = tmp_path / f"small-{len(mounted)}"
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)], check=True, timeout=30
        )
        mounted.append(folder)
        return stores.make(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


RESERVE_BYTES = 256 * MIB  # what a conversion leaves free


@pytest.mark.apart
@pytest.mark.guest  # no guest, but a process of its own, or seconds
@pytest.mark.parametrize("space_bytes", [256 * 1024, RESERVE_BYTES + 4 * MIB, RESERVE_BYTES + 12 * MIB, GIB])
@pytest.mark.parametrize("has_length", [True, False])
def test_a_full_disk_leaves_nothing(
    small: Callable[[int], Host], site: Site, disk: Path, space_bytes: int, has_length: bool
) -> None:
    host = small(space_bytes)
    site.has_length = has_length
    raw = disk.with_name(f"{disk.name}.raw").read_bytes()
    site.files["/x.gz"] = gzip.compress(raw[: 2 * MIB] + os.urandom(5 * MIB), 1)
    before, free_bytes = stores.content(host), os.statvfs(host.store.root).f_bavail
    try:
        bring(host, site.url("/x.gz"), is_insecure=True)
        assert space_bytes > RESERVE_BYTES
    except HvctlError as error:
        assert error.code == 8 and error.hint, error
        assert stores.content(host) == before
        parts = sum(path.stat().st_blocks for path in host.store.downloads.glob("*"))
        assert os.statvfs(host.store.root).f_bavail >= free_bytes - parts * 512 // 4096 - 2
        if space_bytes < 1 * MIB:
            assert list(host.store.downloads.glob("*.part")) == [] or has_length


def test_settings_name_another_server() -> None:
    assert Config().simplestreams == "https://images.linuxcontainers.org"
