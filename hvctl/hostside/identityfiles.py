"""What makes one system that one: keys, identifiers, names, what it logged. An image that others start from has none of it.

Looked for in a tree, or by `diskreader.py` in a file system that is not mounted; both through a `Lister`, which follows
no link. What is found is a list of paths, everything in a directory before the directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

MACHINE_ID = "etc/machine-id"
"""Stays, empty: without it systemd takes the next boot for the first one and asks for its settings."""

_FILES = (
    "etc/hostname",
    "var/lib/hvctl/name",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "etc/udev/rules.d/70-persistent-net.rules",
)
_MATCHING = (
    ("etc/ssh", re.compile(r"ssh_host_.*")),
    ("var/lib/dhcp", re.compile(r".*\.leases?")),
    ("var/lib/NetworkManager", re.compile(r".*\.lease|secret_key|seen-bssids|timestamps")),
)
# Everything in them goes, they stay. What is mounted over them is no image's.
_EMPTIED = ("var/lib/cloud", "var/log/journal", "etc/hvctl/identity", "dev", "proc", "run", "sys", "tmp")
_DEEPEST = 100
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Lister(Protocol):
    """A tree that can be looked at."""

    def names(self, path: str) -> dict[str, bool]:
        """What is in a directory, and whether it is a directory; nothing where there is none, or a link is on the way."""


def find(lister: Lister) -> Iterator[tuple[str, bool]]:
    """Paths that are to go, and whether each is a directory."""
    for path in _FILES:
        folder, name = os.path.split(path)
        if lister.names(folder).get(name) is False:
            yield path, False
    for folder, pattern in _MATCHING:
        for name, is_directory in lister.names(folder).items():
            if not is_directory and pattern.fullmatch(name):
                yield f"{folder}/{name}", False
    for folder in _EMPTIED:
        yield from _find_below(lister, folder, _DEEPEST)


def remove(tree: Path) -> None:
    """Take it all out of a tree, and sockets and device nodes, which no image has."""
    lister = _Tree(tree)
    for path, is_directory in list(find(lister)):
        folder, name = os.path.split(path)
        with lister.open(folder) as parent:
            if is_directory:
                shutil.rmtree(name, dir_fd=parent)  # what lies deeper than was looked for, too
            else:
                os.unlink(name, dir_fd=parent)
    folder, name = os.path.split(MACHINE_ID)
    if name in lister.names(folder):
        with lister.open(folder) as parent:
            os.unlink(name, dir_fd=parent)
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=parent))
    for _path, _folders, names, parent in os.fwalk(tree):
        for name in names:
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                os.unlink(name, dir_fd=parent)


def _find_below(lister: Lister, folder: str, most_deep: int) -> Iterator[tuple[str, bool]]:
    for name, is_directory in lister.names(folder).items():
        if is_directory and most_deep:
            yield from _find_below(lister, f"{folder}/{name}", most_deep - 1)
        yield f"{folder}/{name}", is_directory


class _Tree:
    """A tree of this host's, nobody else at work in it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self, path: str) -> dict[str, bool]:
        try:
            with self.open(path) as folder, os.scandir(folder) as entries:
                return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[int]:
        """A directory, reached without following any link."""
        with contextlib.ExitStack() as stack:
            here = os.open(self._root, _DIRECTORY)
            stack.callback(os.close, here)
            for name in path.split("/"):
                here = os.open(name, _DIRECTORY, dir_fd=here)
                stack.callback(os.close, here)
            yield here
