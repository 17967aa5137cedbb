"""Known files in foreign trees: never one outside, never waiting, never too much."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import HostError, InvalidSpec
from hvctl.host import Host
from hvctl.rootfs import intake


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "passwd").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    return tree


def test_a_file_is_read(host: Host, tree: Path) -> None:
    assert intake.read_in_tree(host, tree, "etc/passwd", limit_bytes=6) == b"inside"
    assert intake.read_in_tree(host, tree, "/etc/passwd") == b"inside"


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../../../etc/passwd", "etc/passwd", "/proc/self/root/etc/passwd"]
)
def test_a_link_leads_to_what_it_is_inside(host: Host, tree: Path, target: str) -> None:
    (tree / "link").symlink_to(target)
    expected = None if "proc" in target else b"inside"
    assert intake.read_in_tree(host, tree, "link") == expected


@pytest.mark.parametrize("target", ["/secret", "../secret", "../../secret"])
def test_a_link_out_leads_nowhere(host: Host, tree: Path, target: str) -> None:
    (tree / "etc" / "passwd").unlink()
    (tree / "etc" / "passwd").symlink_to(target)
    assert intake.read_in_tree(host, tree, "etc/passwd") is None
    assert intake.read_in_tree(host, tree, "../secret") is None


@pytest.mark.parametrize("directory", ["/", "..", "../.."])
def test_a_directory_that_is_a_link_out_leads_nowhere(host: Host, tree: Path, directory: str) -> None:
    (tree / "out").symlink_to(directory)
    assert intake.read_in_tree(host, tree, "out/secret") is None


def test_what_is_not_there_is_none(host: Host, tree: Path) -> None:
    for name in ("none", "etc/none/x", "etc/passwd/x"):
        assert intake.read_in_tree(host, tree, name) is None
    with pytest.raises(HostError):
        intake.read_in_tree(host, tree / "none", "etc/passwd")


def test_what_is_no_plain_file_is_refused_at_once(host: Host, tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    (tree / "loop").symlink_to("loop")
    for name, reason in {"pipe": "no regular file", "etc": "no regular file", "loop": "Too many"}.items():
        with pytest.raises(InvalidSpec, match=reason):
            intake.read_in_tree(host, tree, name)


def test_a_file_that_is_too_long_is_refused(host: Host, tree: Path) -> None:
    with (tree / "etc" / "passwd").open("wb") as file:
        file.truncate(10 * 1024**3)
    with pytest.raises(InvalidSpec, match="longer than 1048576 bytes"):
        intake.read_in_tree(host, tree, "etc/passwd")


def test_a_directory_that_is_swapped_meanwhile_leads_nowhere(host: Host, tree: Path, tmp_path: Path) -> None:
    """Somebody in the tree exchanges a directory for a link out, again and again."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("outside")
    (tree / "link").symlink_to(tmp_path / "etc")
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            for source, target in (("etc", "kept"), ("link", "etc"), ("etc", "link"), ("kept", "etc")):
                (tree / source).rename(tree / target)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        found: set[bytes | None] = set()
        for number in range(300_000):
            if number >= 3000 and b"inside" in found:  # on a busy machine it may be away whenever somebody looks
                break
            found.add(intake.read_in_tree(host, tree, "etc/passwd"))
    finally:
        is_over.set()
        thread.join()
    assert found <= {b"inside", None} and b"inside" in found
