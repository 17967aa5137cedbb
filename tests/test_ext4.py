"""File systems and partition tables are read without the kernel: everything is kept, nothing is believed."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
from pathlib import Path

import pytest

from hvctl.hostside import diskreader, partitions
from hvctl.hostside.diskview import Raw
from hvctl.hostside.ext4 import ROOT, FileSystem
from hvctl.hostside.partitions import Part
from hvctl.hostside.refusal import Refused
from tests import trees

MIB = 1024**2
SIZE_BYTES = 48 * MIB
KINDS = {
    "ext4": ("-t", "ext4"),
    "small blocks, no extents": ("-t", "ext4", "-b", "1024", "-O", "^extents,^64bit"),
    "content in inodes": ("-t", "ext4", "-O", "inline_data"),
    "attributes in inodes of their own": ("-t", "ext4", "-O", "ea_inode"),
    "ext3": ("-t", "ext3"),
    "ext2 with short inodes": ("-t", "ext2", "-I", "128"),
}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="files of other owners are made")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that a tree may have."""
    top = tmp_path_factory.mktemp("tree")
    for folder in ("etc", "d/e", "many", f"{'n' * 250}/{'m' * 250}"):
        (top / folder).mkdir(parents=True)
    (top / "etc/os-release").write_text("ID=test\n")
    (top / "d/f").write_bytes(os.urandom(300_000))
    (top / "d/e/second").hardlink_to(top / "d/f")
    (top / "empty").touch()
    (top / "two\nlines").write_text("x")
    (top / "short").symlink_to("/etc/os-release")
    (top / "long").symlink_to("x/" * 150)
    os.mkfifo(top / "fifo")
    os.setxattr(top / "d/f", "user.long", b"y" * 700)
    os.setxattr(top / "d/e", "user.short", b"z")
    os.setxattr(
        top / "etc/os-release", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000")
    )
    acl = bytes.fromhex("02000000 01000700ffffffff 02000700d2040000 04000500ffffffff 10000700ffffffff 20000500ffffffff")
    os.setxattr(top / "d", "system.posix_acl_access", acl)
    os.chown(top / "d/e", 70_000, 1_879_048_192)
    os.chmod(top / "d/f", 0o4755)
    with (top / "sparse").open("wb") as file:
        file.seek(20_000_000)
        file.write(b"in the middle")
        file.truncate(50 * MIB)
    for number in range(1500):
        (top / f"many/a-file-with-a-rather-long-name-{number}").write_text(str(number))
    for path in [top, *top.rglob("*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    return top


def make(tree: Path, path: Path, *words: str, offset: int = 0, size_bytes: int = SIZE_BYTES) -> Path:
    """A file system of a tree in a file."""
    with path.open("ab") as file:
        file.truncate(max(path.stat().st_size, offset + size_bytes))
    where = ["-E", f"offset={offset}"] if offset else []
    command = ["mke2fs", "-q", "-F", *words, *where, "-d", str(tree), "--", str(path), f"{size_bytes // 1024}k"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return path


def unpack(disk: Path, target: Path, *, offset: int = 0, size: int = SIZE_BYTES) -> Path:
    """The tree that the reader finds there."""
    archive = target.with_suffix(".tar")
    diskreader.main(["pack", str(disk), str(offset), str(size), str(archive)])
    target.mkdir()
    words = ["tar", "-C", str(target), "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", str(archive)]
    subprocess.run(words, check=True, timeout=60)
    return target


def survey(path: Path) -> list[Part]:
    with path.open("rb") as file:
        return partitions.survey(Raw(file.fileno()))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_of_a_tree_is_kept(tree: Path, tmp_path: Path, kind: str) -> None:
    disk = make(tree, tmp_path / "disk", *KINDS[kind])
    found, wanted = trees.fingerprint(unpack(disk, tmp_path / "tree")), trees.fingerprint(tree)
    if "inline_data" in KINDS[kind][-1]:  # mke2fs 1.47.0 forgets the end of a file with holes there
        assert found.pop("sparse") != wanted.pop("sparse")
    assert found == wanted
    assert (tmp_path / "tree/sparse").stat().st_blocks * 512 < MIB


def test_a_journal_that_is_not_empty_is_not_read(tree: Path, tmp_path: Path) -> None:
    disk = make(tree, tmp_path / "disk", "-t", "ext4")
    subprocess.run(
        ["debugfs", "-w", "-R", "feature needs_recovery", str(disk)], check=True, capture_output=True, timeout=30
    )
    (part,) = survey(disk)
    assert (part.needs_recovery, part.is_root) == (True, False)
    subprocess.run(["e2fsck", "-fy", str(disk)], capture_output=True, timeout=30)
    (part,) = survey(disk)
    assert (part.needs_recovery, part.is_root) == (False, True)


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_the_root_among_partitions_is_found(tree: Path, tmp_path: Path, label: str) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 160 * MIB)
    # A small one, an empty one, and the root; in a DOS table the last two in an extended one.
    table = f"label: {label}\n"
    table += "size=8MiB\nsize=20MiB\nsize=64MiB\n" if label == "gpt" else "size=8MiB\ntype=5\nsize=20MiB\nsize=64MiB\n"
    subprocess.run(["sfdisk", "-q", str(disk)], input=table.encode(), check=True, timeout=30)
    answer = subprocess.run(["sfdisk", "--json", str(disk)], capture_output=True, check=True, timeout=30)
    last = json.loads(answer.stdout)["partitiontable"]["partitions"][-1]
    make(tree, disk, "-t", "ext4", offset=last["start"] * 512)
    root = partitions.choose_root(survey(disk))
    assert root is not None
    assert (root.offset, root.size, root.is_root) == (last["start"] * 512, 64 * MIB, True)
    found = unpack(disk, tmp_path / "tree", offset=root.offset, size=root.size)
    assert trees.fingerprint(found) == trees.fingerprint(tree)


def test_a_tree_that_is_no_system_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (part,) = survey(make(tmp_path / "tree", tmp_path / "disk", "-t", "ext4"))
    assert (part.kind, part.is_root) == ("ext4", False)
    assert partitions.choose_root([part]) is None


def test_what_another_reads_is_named(tree: Path, tmp_path: Path) -> None:
    disk = make(tree, tmp_path / "disk", "-t", "ext4", "-O", "meta_bg,^resize_inode")
    (part,) = survey(disk)
    assert "meta_bg" in part.problem
    assert partitions.choose_root([part]) == part


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_and_never_a_surprise(tmp_path: Path, kind: str) -> None:
    """Bytes are changed at random; whatever is read then, it ends, with one kind of error."""
    tree = tmp_path / "small"
    (tree / "etc").mkdir(parents=True)
    for number in range(40):
        (tree / f"etc/file-{number}").write_text("x" * number)
    os.setxattr(tree / "etc", "user.name", b"y" * 600)
    (tree / "link").symlink_to("z" * 100)
    disk = make(tree, tmp_path / "disk", *KINDS[kind], size_bytes=8 * MIB)
    content = disk.read_bytes()
    used = [at for at in range(1024, len(content), 512) if any(content[at : at + 512])]
    chance = random.Random(kind)
    refused = 0
    with disk.open("r+b", buffering=0) as file:
        for _try in range(300):
            places = [chance.choice(used) + chance.randrange(512) for _byte in range(chance.choice((1, 8, 64)))]
            for place in places:
                os.pwrite(file.fileno(), bytes([chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))]), place)
            refused += read_everything(disk)
            for place in places:
                os.pwrite(file.fileno(), content[place : place + 1], place)
    assert refused
    assert not read_everything(disk)


def read_everything(path: Path) -> bool:
    """Whether it was refused somewhere."""
    with path.open("rb") as file:
        try:
            system = FileSystem(Raw(file.fileno()), 0, path.stat().st_size)
            system.check()
            waiting, seen = [ROOT], 0
            while waiting and seen < 500:
                seen += 1
                inode = system.inode(waiting.pop())
                if stat.S_ISDIR(inode.mode):
                    waiting += [number for _name, number in system.entries(inode)]
                elif stat.S_ISLNK(inode.mode):
                    system.link(inode)
                elif stat.S_ISREG(inode.mode) and system.inline_content(inode) is None:
                    system.pieces(inode)
        except Refused:
            return True
    return False
