"""Places in a container's root where libvirt mounts something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvctl.hostside import targets


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """With links out of it and in it, and a file."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside, root / "real" / "deep"):
        folder.mkdir(parents=True)
    (root / "out").symlink_to(outside)
    (root / "real" / "in").symlink_to("deep")
    (root / "file").write_text("kept")
    return root


@pytest.mark.parametrize(
    ("target", "obstacle"),
    [
        ("/real/deep", ""), ("/new/deep", ""), ("/real/new", ""),
        ("/out", "/out"), ("/out/x", "/out"), ("/real/in/x", "/real/in"), ("/file", "/file"), ("/file/x", "/file"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_is_found_and_put_aside(tree: Path, target: str, obstacle: str) -> None:
    assert targets.find_obstacle(tree, target) == obstacle
    targets.make_ready(tree, os.getuid(), [target, "/", "/proc/meminfo", "/dev/x/y"])
    assert targets.find_obstacle(tree, target) == ""
    assert (tree / target[1:]).resolve() == tree / target[1:]
    assert not (tree / "proc").exists()
    if obstacle:
        assert os.path.lexists(tree / f"{obstacle[1:]}.aside")
    assert list((tree.parent / "outside").iterdir()) == []


def test_what_was_put_aside_before_stays(tree: Path) -> None:
    for _time in range(3):
        targets.make_ready(tree, os.getuid(), ["/out"])
        (tree / "out").rmdir()
        (tree / "out").symlink_to("real")
    assert {path.name for path in tree.iterdir()} == {"real", "file", "out", "out.aside", "out.aside1", "out.aside2"}


@pytest.mark.parametrize("name", [".oldroot", "proc", "sys", "dev"])
def test_what_libvirt_uses_itself_is_no_link(tree: Path, name: str) -> None:
    (tree / name).symlink_to("/etc")
    targets.make_ready(tree, os.getuid(), [])
    assert not (tree / name).is_symlink()


def test_a_target_in_another_is_refused(tree: Path) -> None:
    with pytest.raises(OSError, match="'/a/b' lies in '/a'"):
        targets.make_ready(tree, os.getuid(), ["/a/b", "/ab", "/a"])
    assert targets.find_outer("/a/b", ["/ab", "/a"]) == "/a"
    assert targets.find_outer("/a", ["/ab", "/a/b"]) == "/a/b"
    assert targets.find_outer("/a", ["/ab", "/a"]) == ""
