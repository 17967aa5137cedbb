"""What differs between two stacks of overlay layers, by reading the layers: no overlay is mounted, nothing is written.

Only for stacks that nobody writes to meanwhile: paths in them are looked up by name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hvctl.hostside import layers
from hvctl.values import dataclass

ADDED, CHANGED, REMOVED = "added", "changed", "removed"
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Tree:
    """A directory of one layer (or of the image), and the first id of the container that wrote it."""

    path: Path
    first_id: int


Stack = tuple[Tree, ...]
"""The same directory in several layers, topmost first; one of them that hides what is below is the last."""


def list_differences(old: Stack, new: Stack) -> list[tuple[str, str]]:
    """What was added, changed or removed from one stack to the other, as (kind, absolute path), by path."""
    return sorted(_compare(old, new, ""), key=lambda item: item[1])


def _compare(old: Stack, new: Stack, where: str) -> Iterator[tuple[str, str]]:
    """What only layers that both have speak of is the same in both."""
    names = {name for tree in set(old) ^ set(new) for name in os.listdir(tree.path)}
    for name in names:
        path = f"{where}/{name}"
        before, after = _find(old, name), _find(new, name)
        if before and after:
            yield from _compare_entry(before, after, path)
        elif before or after:
            yield from _list_all(before or after, path, REMOVED if before else ADDED)


def _compare_entry(before: Stack, after: Stack, path: str) -> Iterator[tuple[str, str]]:
    if before == after:
        return
    are_directories = _is_directory(before), _is_directory(after)
    if not _is_same(before[0], after[0], with_content=not all(are_directories)):
        yield CHANGED, path
    if all(are_directories):
        yield from _compare(before, after, path)
    elif are_directories[0]:
        yield from _list_below(before, path, REMOVED)
    elif are_directories[1]:
        yield from _list_below(after, path, ADDED)


def _find(stack: Stack, name: str) -> Stack:
    """An entry of a directory: alone what is no directory, all that are merged of one that is; empty: not there."""
    found: list[Tree] = []
    for tree in stack:
        entry = Tree(tree.path / name, tree.first_id)
        if not os.path.lexists(entry.path):
            continue
        if not stat.S_ISDIR(entry.path.lstat().st_mode):
            return tuple(found) if found or layers.is_whiteout(entry.path) else (entry,)
        found.append(entry)
        if layers.is_opaque(entry.path):
            break
    return tuple(found)


def _list_all(stack: Stack, path: str, kind: str) -> Iterator[tuple[str, str]]:
    yield kind, path
    if _is_directory(stack):
        yield from _list_below(stack, path, kind)


def _list_below(stack: Stack, path: str, kind: str) -> Iterator[tuple[str, str]]:
    for name in {name for tree in stack for name in os.listdir(tree.path)}:
        entry = _find(stack, name)
        if entry:
            yield from _list_all(entry, f"{path}/{name}", kind)


def _is_directory(stack: Stack) -> bool:
    return stat.S_ISDIR(stack[0].path.lstat().st_mode)


def _is_same(one: Tree, other: Tree, *, with_content: bool) -> bool:
    a, b = one.path.lstat(), other.path.lstat()
    if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino):
        return True
    if (a.st_mode, a.st_uid - one.first_id, a.st_gid - one.first_id) != (
        b.st_mode,
        b.st_uid - other.first_id,
        b.st_gid - other.first_id,
    ):
        return False
    if not with_content:
        return True
    if stat.S_ISLNK(a.st_mode):
        return os.readlink(one.path) == os.readlink(other.path)
    if stat.S_ISREG(a.st_mode):
        return a.st_size == b.st_size and _has_same_content(one.path, other.path)
    return a.st_rdev == b.st_rdev


def _has_same_content(one: Path, other: Path) -> bool:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(one, flags), "rb") as a, os.fdopen(os.open(other, flags), "rb") as b:
        while True:
            chunk = a.read(_CHUNK_BYTES)
            if chunk != b.read(_CHUNK_BYTES):
                return False
            if not chunk:
                return True
