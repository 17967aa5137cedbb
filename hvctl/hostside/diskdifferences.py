"""The confined worker that compares the files of two states of one disk.

    main([{"formats": ["qcow2", ...], "old": [1, 2], "new": [0, 1, 2]}])       files are /in/0, /in/1, ...; topmost first

Both states are stacks of files that they mostly share. What lies in the very same place of the very same file is the same:
it is not read, and nothing of a content is believed of a time or a checksum. Says as JSON what differs, or why it cannot.
"""

from __future__ import annotations

import bisect
import itertools
import json
import operator
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field

from hvctl.hostside import diskview, journal, partitions, refusal, sandbox
from hvctl.hostside.differences import ADDED, CHANGED, REMOVED
from hvctl.hostside.diskview import Chain, Disk, Qcow2, Raw
from hvctl.hostside.ext4 import ROOT, FileSystem, Inode
from hvctl.hostside.partitions import Part
from hvctl.hostside.refusal import Refused
from hvctl.values import dataclass

Pieces = Sequence[tuple[int, int, int]]
"""Of a file: where in it, where on the disk, how long."""

_DEEPEST = 250
_CHUNK_BYTES = 1024 * 1024
_MOST_PATH_BYTES = 64 * 1024**2


def main(arguments: Sequence[str]) -> None:
    """Compare, and say it."""
    sys.excepthook = refusal.give_up
    wanted = json.loads(arguments[0])
    files = [_open(sandbox.place_input(number), format_) for number, format_ in enumerate(wanted["formats"])]
    old, new = (_replay(Chain([files[number] for number in wanted[which]])) for which in ("old", "new"))
    found = list(_limit(list_differences(_open_root(old), _open_root(new))))
    sys.stdout.write(json.dumps({"differences": found, "others": [part.kind for part in _list_others(new)]}))


def list_differences(old: FileSystem, new: FileSystem) -> Iterator[tuple[str, str]]:
    """What was added, changed or removed, as (kind, absolute path); in no order."""
    return _Comparison(_Side(old), _Side(new)).compare()


def _open(path: str, format_: str) -> Raw | Qcow2:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return Qcow2(descriptor) if format_ == "qcow2" else Raw(descriptor)


def _replay(disk: Disk) -> Disk:
    for part in partitions.survey(disk):
        if part.needs_recovery:
            disk = journal.replay(disk, part.offset, part.size)
    return disk


def _open_root(disk: Disk) -> FileSystem:
    parts = partitions.survey(disk, ignoring_journals=True)
    root = partitions.choose_root(parts)
    if root is None:
        kinds = ", ".join(sorted({part.kind or "unknown" for part in parts}))
        raise Refused(f"there is no Linux root on its disk (found: {kinds})")
    if not root.is_root:
        raise Refused(
            root.problem or f"its root is on {root.kind}, which hvctl does not read; only ext2, ext3 and ext4"
        )
    system = FileSystem(disk, root.offset, root.size)
    system.check(ignoring_journal=True)
    return system


def _list_others(disk: Disk) -> list[Part]:
    """Parts beside the root that have files, too."""
    parts = partitions.survey(disk, ignoring_journals=True)
    root = partitions.choose_root(parts)
    return [part for part in parts if part != root and part.kind not in ("", "swap")]


def _limit(found: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """A guest can have paths that fill any memory."""
    left_bytes = _MOST_PATH_BYTES
    for item in found:
        left_bytes -= len(item[1])
        if left_bytes < 0:
            raise Refused(f"the paths of what differs come to more than {_MOST_PATH_BYTES} bytes")
        yield item


@dataclass
class _Side:
    """One state, and which directories of it were seen."""

    system: FileSystem
    seen: set[int] = field(default_factory=set)

    def list(self, inode: Inode, depth: int) -> dict[bytes, int]:
        if inode.number in self.seen or depth > _DEEPEST:
            raise Refused("a directory contains itself, or others too deep")
        self.seen.add(inode.number)
        return dict(self.system.entries(inode))


class _Comparison:
    """Two states on their way to a list."""

    def __init__(self, old: _Side, new: _Side) -> None:
        self._old = old
        self._new = new
        self._waiting: list[tuple[bytes, Inode, Inode, int]] = []
        """Directories that both have: path, both inodes, depth."""
        self._are_alike = old.system.layout == new.system.layout
        """Whether an inode of the same bytes means the same in both."""

    def compare(self) -> Iterator[tuple[str, str]]:
        one, other = (side.system.inode(ROOT, with_attributes=False) for side in (self._old, self._new))
        self._waiting.append((b"", one, other, 0))
        while self._waiting:
            path, one, other, depth = self._waiting.pop()
            before = self._old.list(one, depth)
            is_same = one is other and self._is_in_same_place(one)
            after = before if is_same else self._new.list(other, depth)
            for name in before.keys() | after.keys():
                inner = path + b"/" + name
                if name not in before:
                    yield from self._list_all(self._new, after[name], inner, ADDED, depth)
                elif name not in after:
                    yield from self._list_all(self._old, before[name], inner, REMOVED, depth)
                else:
                    yield from self._compare_entry(inner, before[name], after[name], depth)

    def _compare_entry(self, path: bytes, before: int, after: int, depth: int) -> Iterator[tuple[str, str]]:
        one, other = self._read(before, after)
        are_directories = stat.S_ISDIR(one.mode), stat.S_ISDIR(other.mode)
        if not self._is_same(one, other):
            yield CHANGED, os.fsdecode(path)
        if all(are_directories):
            self._waiting.append((path, one, other, depth + 1))
        elif are_directories[0]:
            yield from self._list_below(self._old, one, path, REMOVED, depth)
        elif are_directories[1]:
            yield from self._list_below(self._new, other, path, ADDED, depth)

    def _read(self, before: int, after: int) -> tuple[Inode, Inode]:
        """Both inodes; one object where they are the same bytes."""
        one = self._old.system.inode(before, with_attributes=False)
        place, size = self._old.system.place_inode(before), self._old.system.inode_bytes
        is_same = self._are_alike and before == after and place == self._new.system.place_inode(after)
        if is_same and self._is_shared(place, size):
            return one, one
        return one, self._new.system.inode(after, with_attributes=False)

    def _list_all(self, side: _Side, number: int, path: bytes, kind: str, depth: int) -> Iterator[tuple[str, str]]:
        yield kind, os.fsdecode(path)
        inode = side.system.inode(number, with_attributes=False)
        if stat.S_ISDIR(inode.mode):
            yield from self._list_below(side, inode, path, kind, depth)

    def _list_below(self, side: _Side, inode: Inode, path: bytes, kind: str, depth: int) -> Iterator[tuple[str, str]]:
        for name, number in side.list(inode, depth + 1).items():
            yield from self._list_all(side, number, path + b"/" + name, kind, depth + 1)

    def _is_same(self, one: Inode, other: Inode) -> bool:
        if one is not other and (one.mode, one.uid, one.gid) != (other.mode, other.uid, other.gid):
            return False
        match stat.S_IFMT(one.mode):
            case stat.S_IFLNK:
                return self._old.system.link(one) == self._new.system.link(other)
            case stat.S_IFREG:
                return one.size == other.size and self._has_same_content(one, other)
            case stat.S_IFCHR | stat.S_IFBLK:
                return one.map == other.map
        return True

    def _is_shared(self, place: int, size: int) -> bool:
        return diskview.is_same(self._old.system.disk, self._new.system.disk, place, size)

    def _is_in_same_place(self, inode: Inode) -> bool:
        """Whether all content is shared, of an inode that is the same in both."""
        if inode.has_content_inside:
            return True
        return inode.lists_its_extents and all(
            self._is_shared(place, length) for _start, place, length in self._old.system.pieces(inode)
        )

    def _has_same_content(self, one: Inode, other: Inode) -> bool:
        if one is other and self._is_in_same_place(one):
            return True
        return all(self._is_same_span(one, other, *span) for span in self._list_spans(one, other))

    def _list_spans(self, one: Inode, other: Inode) -> Iterator[tuple[int, int]]:
        """Start and end of what is to be read of both: what is no hole in both and lies in different places."""
        pieces, others = _pieces(self._old.system, one), _pieces(self._new.system, other)
        is_inside = one.has_content_inside or other.has_content_inside
        edges = {edge for start, _place, length in (*pieces, *others) for edge in (start, start + length)}
        for start, end in itertools.pairwise(sorted(edges | {0, one.size})):
            place, other_place = _find(pieces, start), _find(others, start)
            is_same = place == other_place and (place is None or self._is_shared(place, end - start))
            if is_inside or not is_same:
                yield start, end

    def _is_same_span(self, one: Inode, other: Inode, start: int, end: int) -> bool:
        mine, theirs = ((self._old.system, one), (self._new.system, other))
        chunks = zip(_read_content(*mine, start, end), _read_content(*theirs, start, end), strict=True)
        return all(chunk == another for chunk, another in chunks)


def _pieces(system: FileSystem, inode: Inode) -> Pieces:
    return [] if inode.has_content_inside else system.pieces(inode)


def _find(pieces: Pieces, offset: int) -> int | None:
    """Where a byte of a file is on the disk; None: in a hole."""
    index = bisect.bisect_right(pieces, offset, key=operator.itemgetter(0)) - 1
    start, place, length = pieces[index] if index >= 0 else (0, 0, 0)
    return place + offset - start if offset < start + length else None


def _read_content(system: FileSystem, inode: Inode, start: int, end: int) -> Iterator[bytes]:
    """A stretch of a file that lies in one piece or in one hole, in chunks of one length."""
    inline = system.inline_content(inode)
    place = None if inline is not None else _find(system.pieces(inode), start)
    while start < end:
        count = min(_CHUNK_BYTES, end - start)
        if inline is not None:
            yield inline[start : start + count]
        elif place is None:
            yield bytes(count)
        else:
            yield system.disk.read(place, count)
            place += count
        start += count
