"""Honest archives through the confined worker, as others unpack them; limits, digests, bombs on a small file system."""

from __future__ import annotations

import gzip
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.host import Host
from hvctl.rootfs import intake
from hvctl.rootfs.intake import Limits
from hvctl.units import MIB
from tests import ocilayout
from tests.tarballs import COMPRESS, entry, tar, zstd
from tests.trees import fingerprint

pytestmark = pytest.mark.guest  # needs root, and bubblewrap
LIMITS = Limits(reserve_bytes=0)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB, on a loop device. What is in it must be gone in the end, and the space back."""
    disk, mounted = tmp_path / "small.ext4", tmp_path / "small"
    mounted.mkdir()
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(disk)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(disk), str(mounted)], check=True, timeout=60)
    try:
        free = os.statvfs(mounted).f_bfree, os.statvfs(mounted).f_ffree
        yield mounted
        assert os.listdir(mounted) == ["lost+found"]
        os.sync()
        assert (os.statvfs(mounted).f_bfree, os.statvfs(mounted).f_ffree) == free
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=60)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def honest(tmp_path: Path) -> Path:
    """A tree with a file of every kind."""
    tree = tmp_path / "honest"
    (tree / "d" / "e").mkdir(parents=True)
    (tree / "d" / "file").write_bytes(os.urandom(300_000))
    (tree / "d" / "empty").touch()
    os.link(tree / "d" / "file", tree / "hard")
    (tree / "soft").symlink_to("d/file")
    os.mkfifo(tree / "pipe")
    with (tree / "holes").open("wb") as file:
        for offset in (0, 5 * MIB, 9 * MIB):
            file.seek(offset)
            file.write(b"data")
        file.truncate(20 * MIB)
    os.chown(tree / "d" / "empty", 1000, 2**31)
    os.chown(tree / "soft", 12, 34, follow_symlinks=False)
    (tree / "d" / "empty").chmod(0o6751)
    os.setxattr(tree / "d", "user.note", b"\0\xff")
    os.setxattr(tree / "d" / "file", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, ns=(10**9, 1_234_567_890_123_456_000), follow_symlinks=False)
    return tree


def pack(tree: Path, archive: Path, *options: str) -> Path:
    words = [
        "tar",
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        *options,
        "-cf",
        str(archive),
        "-C",
        str(tree),
        ".",
    ]
    subprocess.run(words, check=True, timeout=60)
    return archive


@pytest.mark.parametrize(
    "options", [("--format=posix",), ("--format=posix", "-S"), ("--format=pax", "-S", "--sparse-version=0.1")], ids=str
)
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_tree_comes_out_as_it_went_in(
    host: Host, tmp_path: Path, honest: Path, compression: str, options: tuple[str, ...]
) -> None:
    plain = pack(honest, tmp_path / "a.tar", *options)
    if "-S" in options:
        assert plain.stat().st_size < 2 * MIB
    archive = write(tmp_path / "archive", COMPRESS[compression](plain.read_bytes()))
    intake.unpack_tree(host, archive, tmp_path / "tree", limits=LIMITS)
    assert fingerprint(tmp_path / "tree") == fingerprint(honest)
    if "-S" in options:
        assert (tmp_path / "tree" / "holes").stat().st_blocks < 200


def test_gnu_archives_keep_what_they_can(host: Host, tmp_path: Path, honest: Path) -> None:
    (honest / ("long" * 40)).touch()
    (honest / "to-long").symlink_to("target" * 40)
    archive = tmp_path / "a.tar"
    words = ["tar", "--numeric-owner", "--format=gnu", "-S", "-cf", str(archive), "-C", str(honest), "."]
    subprocess.run(words, check=True, timeout=60)
    intake.unpack_tree(host, archive, tmp_path / "tree", limits=LIMITS)
    alone = tmp_path / "by-tar"
    alone.mkdir()
    subprocess.run(["tar", "--numeric-owner", "-xpf", str(archive), "-C", str(alone)], check=True, timeout=60)
    assert fingerprint(tmp_path / "tree") == fingerprint(alone)


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_a_squashfs_image_is_a_tree_too(host: Host, tmp_path: Path, honest: Path, compression: str) -> None:
    archive = tmp_path / "root.squashfs"
    words = ["mksquashfs", str(honest), str(archive), "-quiet", "-no-progress", "-comp", compression]
    subprocess.run(words, check=True, timeout=60)
    intake.unpack_tree(host, archive, tmp_path / "tree", limits=LIMITS)
    alone = tmp_path / "alone"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", str(alone), str(archive)], check=True, timeout=60)
    assert fingerprint(tmp_path / "tree") == fingerprint(alone)


def test_several_streams_in_one_file_are_one_archive(host: Host, tmp_path: Path) -> None:
    first, second = entry("a", content=b"a" * 3000), tar(entry("b"))
    for number, blob in enumerate(
        [
            gzip.compress(first) + gzip.compress(second) + bytes(100),
            zstd(first) + zstd(second),
            COMPRESS["xz"](first) + COMPRESS["xz"](second),
        ]
    ):
        tree = tmp_path / f"tree{number}"
        intake.unpack_tree(host, write(tmp_path / "archive", blob), tree, limits=LIMITS)
        assert sorted(os.listdir(tree)) == ["a", "b"]


def test_layers_come_out_as_umoci_unpacks_them(host: Host, tmp_path: Path) -> None:
    layers = ocilayout.write(tmp_path / "layout", "it", ocilayout.make_layers())
    intake.unpack_layers(host, layers, tmp_path / "tree", limits=LIMITS)
    words = ["umoci", "raw", "unpack", "--image", f"{tmp_path / 'layout'}:it", str(tmp_path / "umoci")]
    subprocess.run(words, check=True, timeout=60, capture_output=True)
    mine, theirs = fingerprint(tmp_path / "tree"), fingerprint(tmp_path / "umoci")
    assert mine == theirs
