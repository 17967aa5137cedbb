"""What a disk's root has otherwise than a tree: each kind of difference, and none where there is none."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hvctl.hostside import layers

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="files of other owners are made")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of everything."""
    root = tmp_path / "tree"
    for path in ("etc", "home/user", "usr/lib"):
        (root / path).mkdir(parents=True)
    (root / "etc/short").write_text("short")
    (root / "etc/long").write_bytes(os.urandom(3 * 1024**2))
    (root / "etc/empty").write_text("")
    with (root / "etc/holes").open("wb") as stream:
        stream.truncate(2 * 1024**2)
        stream.seek(1024**2)
        stream.write(b"middle")
    os.symlink("short", root / "etc/link")
    os.symlink("x" * 200, root / "etc/long link")
    os.link(root / "etc/short", root / "usr/lib/twin")
    os.mkfifo(root / "home/user/fifo")
    os.chown(root / "home/user", 1000, 1000)
    os.setxattr(root / "etc/short", "user.note", b"mine")
    return root


def compare(
    tmp_path: Path, tree: Path, change: Callable[[Path], object], *left_out: str
) -> tuple[list[str], list[str]]:
    """What is written and what is gone when a copy of the tree was changed and made a disk."""
    copy, disk, archive = tmp_path / "copy", tmp_path / "disk", tmp_path / "changes.tar"
    subprocess.run(["cp", "--archive", str(tree), str(copy)], check=True, timeout=30)
    change(copy)
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(copy), str(disk), "32m"]
    subprocess.run(words, check=True, capture_output=True, timeout=30)
    arguments = [str(disk), "0", str(disk.stat().st_size), str(tree), str(archive), *left_out]
    program = "import sys; from hvctl.hostside import diskchanges; diskchanges.main(sys.argv[1:])"
    done = subprocess.run(["python3", "-c", program, *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as found:
        names = [name.removeprefix("./") for name in found.getnames()]
    return sorted(name for name in names if name not in ("", ".")), json.loads(done.stdout)["gone"]


def test_an_unchanged_root_has_no_differences(tmp_path: Path, tree: Path) -> None:
    assert compare(tmp_path, tree, lambda root: None) == ([], [])


def _keep_time(path: Path, content: bytes, at: int) -> None:
    facts = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda root: _keep_time(root / "etc/long", b"!", 2 * 1024**2), ["etc", "etc/long"]),
        (lambda root: _keep_time(root / "etc/holes", b"!", 5), ["etc", "etc/holes"]),
        (lambda root: _keep_time(root / "etc/holes", b"\1", 2 * 1024**2 - 1), ["etc", "etc/holes"]),
        (lambda root: os.chown(root / "etc/empty", 0, 5), ["etc", "etc/empty"]),
        (lambda root: (root / "etc/empty").chmod(0o4755), ["etc", "etc/empty"]),
        (lambda root: os.utime(root / "etc/empty", (1, 1)), ["etc", "etc/empty"]),
        (lambda root: os.setxattr(root / "etc/empty", "user.new", b"1"), ["etc", "etc/empty"]),
        (lambda root: os.removexattr(root / "etc/short", "user.note"), ["etc", "etc/short", "usr", "usr/lib", "usr/lib/twin"]),
        (lambda root: _keep_time(root / "etc/short", b"S", 0), ["etc", "etc/short", "usr", "usr/lib", "usr/lib/twin"]),
        (lambda root: (root / "home/user").chmod(0o700), ["home", "home/user"]),
        (lambda root: root.chmod(0o700), []),
    ],
)  # fmt: skip
def test_whatever_changes_is_written_with_its_directories(
    tmp_path: Path, tree: Path, change: Callable[[Path], object], changed: list[str]
) -> None:
    assert compare(tmp_path, tree, change) == (changed, [])


def test_new_names_and_gone_ones(tmp_path: Path, tree: Path) -> None:
    def change(root: Path) -> None:
        (root / "etc/empty").unlink()
        (root / "usr/lib/twin").unlink()
        os.link(root / "etc/holes", root / "etc/holes too")
        subprocess.run(["rm", "-r", str(root / "home")], check=True, timeout=30)
        (root / "etc/link").unlink()
        (root / "etc/link").mkdir()
        (root / "srv/deep/er").mkdir(parents=True)
        os.mknod(root / "etc/device", stat.S_IFCHR, os.makedev(0, 0))

    written, gone = compare(tmp_path, tree, change)
    assert gone == ["etc/empty", "usr/lib/twin", "home"]
    assert set(written) == {
        *("etc", "etc/holes", "etc/holes too", "etc/link", "usr", "usr/lib", "srv", "srv/deep", "srv/deep/er"),
    }  # fmt: skip


def test_what_is_left_out_is_not_looked_at(tmp_path: Path, tree: Path) -> None:
    def change(root: Path) -> None:
        (root / "usr/lib/modules").mkdir()
        (root / "usr/lib/modules/one").write_text("module")
        times = (tree / "usr/lib").stat()
        os.utime(root / "usr/lib", ns=(times.st_atime_ns, times.st_mtime_ns))

    assert compare(tmp_path, tree, change, "usr/lib/modules") == ([], [])


def test_an_owner_beyond_a_containers_is_refused(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(AssertionError, match="has the uid 65536"):
        compare(tmp_path, tree, lambda root: os.chown(root / "etc/empty", 65536, 0))


def test_whiteouts_go_where_directories_are_and_nowhere_else(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    os.symlink(tmp_path, upper / "out")
    layers.add_whiteouts(upper, ["etc/gone", "home"])
    assert layers.is_whiteout(upper / "etc/gone")
    assert layers.is_whiteout(upper / "home")
    for name in ("out/evil", "../evil", "etc/../../evil", "/evil", "none/evil", ""):
        with pytest.raises(OSError, match=r"."):
            layers.add_whiteouts(upper, [name])
    assert not (tmp_path / "evil").exists()
