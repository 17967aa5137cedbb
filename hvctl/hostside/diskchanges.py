"""The confined worker that tells what a disk's root shows otherwise than a tree: what an overlay on the tree needs.

    diskchanges DISK OFFSET SIZE TREE ARCHIVE [PATH...]

Writes what is new or changed as a tar archive, each entry with the directories that it is in, and tells as JSON which
names of the tree are gone. Compared are kind, owner, mode, time, attributes, which names are one file, and every byte:
a time or a size that is the same proves nothing. A PATH is left out, with all below it.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hvctl.hostside import ids, refusal
from hvctl.hostside.diskreader import DEEPEST, TYPES, Packer
from hvctl.hostside.diskview import Raw
from hvctl.hostside.ext4 import ROOT, FileSystem, Inode
from hvctl.hostside.refusal import Refused, quote
from hvctl.hostside.treewriter import is_kept

_CHUNK_BYTES = 1024 * 1024
_ZEROS = bytes(_CHUNK_BYTES)
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def main(arguments: Sequence[str]) -> None:
    """Compare, write, tell."""
    sys.excepthook = refusal.give_up
    disk, offset, size, tree, archive, *left_out = arguments
    descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    system = FileSystem(Raw(descriptor), int(offset), int(size))
    system.check()
    with open(archive, "xb", buffering=_CHUNK_BYTES) as out:
        comparison = _Comparison(system, descriptor, Packer(system, descriptor, out))
        comparison.compare(os.fsencode(tree), {os.fsencode(path) for path in left_out})
    sys.stdout.write(json.dumps({"gone": [os.fsdecode(path) for path in comparison.gone]}))


class _Name(NamedTuple):
    """One name of a file that has several: what the tree has under it."""

    path: bytes
    there: bytes
    facts: os.stat_result | None


class _Comparison:
    """One root on its way out, as far as the tree does not have it."""

    def __init__(self, system: FileSystem, disk: int, packer: Packer) -> None:
        self._system, self._disk, self._packer = system, disk, packer
        self.gone: list[bytes] = []
        self._left_out: set[bytes] = set()
        self._directories: dict[bytes, Inode] = {}
        """Those that were come to, by path."""
        self._visited: set[int] = set()
        self._written: set[bytes] = set()
        self._linked: dict[int, list[_Name]] = {}
        """The names of files that have several."""

    def compare(self, tree: bytes, left_out: set[bytes]) -> None:
        """Write what differs. The top directory always is, for its owner, mode and time."""
        self._left_out = left_out
        top = self._system.inode(ROOT)
        self._enter(b"", top)
        self._write_directory(b"")
        self._compare_directory(b"", top, tree)
        for number, names in self._linked.items():
            self._compare_linked(self._system.inode(number), names)
        self._packer.finish()

    def _enter(self, path: bytes, inode: Inode) -> None:
        if inode.number in self._visited or path.count(b"/") > DEEPEST:
            raise Refused("a directory contains itself, or others too deep")
        self._visited.add(inode.number)
        self._directories[path] = inode

    def _compare_directory(self, path: bytes, inode: Inode, tree: bytes | None) -> None:
        """`tree`: the directory that the tree has there; None: no directory."""
        there = {name: os.lstat(os.path.join(tree, name)) for name in os.listdir(tree)} if tree is not None else {}
        for name, number in self._system.entries(inode):
            below = os.path.join(path, name)
            facts = there.pop(name, None)
            if below in self._left_out:
                continue
            found, other = self._system.inode(number), os.path.join(tree or b"", name)
            if stat.S_ISDIR(found.mode):
                self._compare_folder(below, found, facts, other)
            elif stat.S_IFMT(found.mode) not in TYPES:  # a device or a socket: no tree has one
                there.update({name: facts} if facts is not None else {})
            elif found.links > 1:
                self._linked.setdefault(number, []).append(_Name(below, other, facts))
            elif facts is None or not self._is_same(found, facts, other):
                self._write(below, found)
        for name in sorted(there):
            self._write_directory(path)
            self.gone.append(os.path.join(path, name))

    def _compare_folder(self, path: bytes, inode: Inode, facts: os.stat_result | None, there: bytes) -> None:
        if path == b"lost+found" and facts is None and not self._system.entries(inode):
            return
        self._enter(path, inode)
        if facts is None or not self._is_same(inode, facts, there):
            self._write_directory(path)
        self._compare_directory(path, inode, there if facts is not None and stat.S_ISDIR(facts.st_mode) else None)

    def _compare_linked(self, inode: Inode, names: list[_Name]) -> None:
        """All names of one file: unchanged only where the tree has a file of just these names."""
        first, count = names[0], len(names)
        one = {(name.facts.st_ino, name.facts.st_nlink) if name.facts else None for name in names}
        is_one = first.facts is not None and one == {(first.facts.st_ino, count)}
        # With the others left out, it has but one name here.
        is_alone = count == 1 and first.facts is not None and first.facts.st_nlink == 1
        if (is_one or is_alone) and first.facts is not None and self._is_same(inode, first.facts, first.there):
            return
        for name in names:
            self._write(name.path, inode)

    def _write(self, path: bytes, inode: Inode) -> None:
        self._write_directory(os.path.dirname(path))
        self._check_owner(path, inode)
        self._packer.write_entry(path, inode)

    def _write_directory(self, path: bytes) -> None:
        """A directory and those that it is in, once."""
        if path in self._written:
            return
        if path:
            self._write_directory(os.path.dirname(path))
        self._written.add(path)
        self._check_owner(path, self._directories[path])
        self._packer.write_entry(path, self._directories[path])

    def _check_owner(self, path: bytes, inode: Inode) -> None:
        for kind, number in (("uid", inode.uid), ("gid", inode.gid)):
            if number >= ids.COUNT:
                raise Refused(f"{quote(path)} has the {kind} {number}, and a container has those below {ids.COUNT}")

    def _is_same(self, inode: Inode, facts: os.stat_result, there: bytes) -> bool:
        if (inode.mode, inode.uid, inode.gid) != (facts.st_mode, facts.st_uid, facts.st_gid):
            return False
        second, rest = divmod(inode.mtime_ns, 10**9)
        if facts.st_mtime_ns != inode.mtime_ns and (rest or second != facts.st_mtime_ns // 10**9):
            return False  # mke2fs leaves the fraction of a second out
        if not stat.S_ISDIR(inode.mode) and inode.size != facts.st_size and not stat.S_ISFIFO(inode.mode):
            return False
        if {name: value for name, value in inode.attributes if is_kept(name)} != _attributes(there):
            return False
        if stat.S_ISLNK(inode.mode):
            return self._system.link(inode) == os.readlink(there)
        return not stat.S_ISREG(inode.mode) or self._has_same_content(inode, there)

    def _has_same_content(self, inode: Inode, there: bytes) -> bool:
        other = os.open(there, _FILE)
        try:
            inline = self._system.inline_content(inode)
            if inline is not None:
                return inline == os.pread(other, inode.size + 1, 0)
            at = 0
            for start, place, length in self._system.pieces(inode):
                if not _is_zero(other, at, start - at):
                    return False
                for done in range(0, length, _CHUNK_BYTES):
                    count = min(_CHUNK_BYTES, length - done)
                    if os.pread(self._disk, count, place + done) != os.pread(other, count, start + done):
                        return False
                at = start + length
            return _is_zero(other, at, inode.size - at)
        finally:
            os.close(other)


def _attributes(path: bytes) -> dict[bytes, bytes]:
    names = (os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False))
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if is_kept(name)}


def _is_zero(descriptor: int, start: int, length: int) -> bool:
    return all(os.pread(descriptor, count, at) == _ZEROS[:count] for at, count in _cut(start, length))


def _cut(start: int, length: int) -> Iterator[tuple[int, int]]:
    for at in range(start, start + length, _CHUNK_BYTES):
        yield at, min(_CHUNK_BYTES, start + length - at)
