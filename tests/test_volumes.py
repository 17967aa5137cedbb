"""Volumes as the kernel mounts them, without libvirt: one loop device a file, shifted owners, nothing left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.hostside import ids, loops, mounts, volumes
from hvctl.hostside.volumes import Volume
from hvctl.units import MIB
from tests.cli import wait_for

pytestmark = [pytest.mark.guest, pytest.mark.apart]

FIRST_ID = 0x70000000 + 5 * ids.COUNT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with an ext4 file system."""
    path = tmp_path / "volumes" / "one" / "disk.raw"
    path.parent.parent.mkdir()
    volumes.make_file(path.parent, path, 32 * MIB)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "--", str(path)], check=True, timeout=30)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "two" / "data"
    volumes.make_directory(path.parent, path)
    return path


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two places to mount something at."""
    found = tmp_path / "mounts" / "a", tmp_path / "mounts" / "b"
    yield found
    for place in found:
        mounts.unmount(place)


def assert_gone(file: Path) -> None:
    """Its loop device goes with the last who has it open, and udev may for a moment."""
    wait_for(lambda: loops.find_loop(file) is None)
    assert loops.find_loop(file) is None


def facts_of(place: Path) -> str:
    """The line of a mount (proc(5), mountinfo)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line for line in lines if f" {place} " in line)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_owners_are_shifted_and_stored_plain(
    kind: str, request: pytest.FixtureRequest, places: tuple[Path, Path]
) -> None:
    path = request.getfixturevalue(kind)
    volumes.mount(Volume(path=path, first_id=0), places[0])
    (places[0] / "made").touch()
    os.chown(places[0] / "made", 1000, 100)
    mounts.unmount(places[0])
    for place, first_id in zip(places, (FIRST_ID, FIRST_ID + ids.COUNT), strict=True):
        volumes.mount(Volume(path=path, first_id=first_id), place)
        seen = (place / "made").stat()
        assert (seen.st_uid, seen.st_gid) == (first_id + 1000, first_id + 100)
        with pytest.raises(OSError, match="too large"):  # an id of this host has no place in it
            (place / "by-root").touch()


def test_one_file_has_one_loop_device_which_goes_with_its_last_mount(file: Path, places: tuple[Path, Path]) -> None:
    """Two would write to the same blocks, each with its own idea of what is there."""
    assert loops.find_loop(file) is None
    for place in places:
        volumes.mount(Volume(path=file, first_id=FIRST_ID), place)
    assert places[0].stat().st_dev == places[1].stat().st_dev
    mounts.unmount(places[0])
    assert loops.find_loop(file) is not None
    mounts.unmount(places[1])
    assert_gone(file)


def test_a_file_system_that_asks_for_a_panic_gets_none(file: Path, places: tuple[Path, Path]) -> None:
    """ext4 keeps in its superblock what the kernel shall do at an error."""
    subprocess.run(["tune2fs", "-e", "panic", str(file)], check=True, timeout=30, capture_output=True)
    volumes.mount(Volume(path=file, first_id=FIRST_ID), places[0])
    assert "errors=remount-ro" in facts_of(places[0])
    assert "panic" not in facts_of(places[0])


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_read_only_is_read_only_and_devices_are_none(
    kind: str, request: pytest.FixtureRequest, places: tuple[Path, Path]
) -> None:
    path = request.getfixturevalue(kind)
    volumes.mount(Volume(path=path, first_id=FIRST_ID, is_read_only=True), places[0])
    with pytest.raises(OSError, match="Read-only"):
        (places[0] / "made").touch()
    assert "nodev" in facts_of(places[0]).split()[5]


def test_what_is_no_file_system_is_refused_and_leaves_no_loop_device(tmp_path: Path, places: tuple[Path, Path]) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with pytest.raises(OSError, match=r".+"):
        volumes.mount(Volume(path=path, first_id=FIRST_ID), places[0])
    assert_gone(path)


def test_what_is_half_grown_is_not_mounted(file: Path, places: tuple[Path, Path]) -> None:
    """What is written to it would be lost, or damage it, when the growth is taken back."""
    volumes.undo_file(file).touch()
    with pytest.raises(OSError, match="hvctl gc"):
        volumes.mount(Volume(path=file, first_id=FIRST_ID), places[0])
    assert loops.find_loop(file) is None


def test_a_directory_volume_is_closed_to_others(directory: Path) -> None:
    done = subprocess.run(
        ["ls", str(directory)], user=65534, group=65534, extra_groups=[], capture_output=True, timeout=30, check=False
    )
    assert done.returncode != 0
