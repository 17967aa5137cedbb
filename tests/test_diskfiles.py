"""What of the host may become a guest's disk, and what must not: links, devices in use, paths that are options."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hvctl.hostside import diskfiles


def make_iso(path: Path, content: bytes = b"\0" * 65536) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_plain_file_is_taken(tmp_path: Path) -> None:
    assert diskfiles.find_fault_of_file(make_iso(tmp_path / "a.iso"), tmp_path / "store") == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("link.iso", "symbolic link"),
        ("through/a.iso", "symbolic link"),
        ("a,b.iso", "comma"),
        ("a=b.iso", "equals sign"),
        ("a\nb.iso", "control character"),
        ("gone.iso", "does not exist"),
        ("pipe", "no regular file"),
        ("folder", "no regular file"),
        ("store/disk.raw", "own store"),
        ("disk.qcow2", "a format of its own"),
        ("folder/../a.iso", "no absolute path"),
    ],
)
def test_another_is_not_and_the_reason_is_told(tmp_path: Path, name: str, reason: str) -> None:
    target = make_iso(tmp_path / "a.iso")
    for made in ("a,b.iso", "a=b.iso", "a\nb.iso", "store/disk.raw"):
        make_iso(tmp_path / made)
    make_iso(tmp_path / "disk.qcow2", b"QFI\xfb\0\0\0\x03")
    (tmp_path / "link.iso").symlink_to(target)
    (tmp_path / "through").symlink_to(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert reason in diskfiles.find_fault_of_file(Path(f"{tmp_path}/{name}"), tmp_path / "store")


def test_a_relative_path_is_not_taken() -> None:
    assert "no absolute path" in diskfiles.find_fault_of_file(Path("a.iso"), Path("/store"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/null", "no block device"),
        ("/dev/shm", "no block device"),
        ("/etc/passwd", "not below /dev"),
        ("/dev/../etc/passwd", "no absolute path"),
        ("/dev/nosuch", "does not exist"),
        ("/dev/a,b", "comma"),
    ],
)
def test_what_is_no_device_is_not_taken_as_one(path: str, reason: str) -> None:
    assert reason in diskfiles.find_fault_of_device(Path(path))


def test_the_size_of_a_qcow2_file_is_read_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "123M"], check=True, timeout=30)
    assert diskfiles.read_qcow2_size(path) == 123 * 1024**2
    path.write_bytes(b"\0" * 100)
    with pytest.raises(OSError, match="not a qcow2 file"):
        diskfiles.read_qcow2_size(path)
