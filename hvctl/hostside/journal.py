"""What the journal of an ext4 file system that was not unmounted has still to write; found, and not written.

Layout and rules: Documentation/filesystems/ext4/journal.rst, fs/jbd2/recovery.c of the kernel. Transactions without their
commit block are passed over, and blocks that a later one revoked. Checksums are not looked at: a journal writes its
commit block when all else has arrived, unless it is `async`, which is refused.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator

from hvctl.hostside.diskview import Disk, Replayed
from hvctl.hostside.ext4 import FileSystem
from hvctl.hostside.refusal import Refused
from hvctl.values import dataclass

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _REVOKE = 1, 2, 5
_REVOKES, _64BIT, _ASYNC, _CHECKSUMS_2, _CHECKSUMS_3 = 0x1, 0x2, 0x4, 0x8, 0x10
_KNOWN = _REVOKES | _64BIT | _CHECKSUMS_2 | _CHECKSUMS_3
_MASKED, _SAME_UUID, _LAST = 1, 2, 8
_HEADER_BYTES, _UUID_BYTES = 12, 16


def replay(disk: Disk, offset: int, size: int) -> Disk:
    """The disk as it is once the journal of the file system there was replayed."""
    system = FileSystem(disk, offset, size)
    system.check(ignoring_journal=True)
    return Replayed(disk, offset, system.block_bytes, dict(_Journal(disk, system).list_newer()))


@dataclass(frozen=True)
class _Block:
    """One block of the log: a control block with its data blocks after it."""

    kind: int
    sequence: int
    content: bytes
    at: int


class _Journal:
    """The log of one file system."""

    def __init__(self, disk: Disk, system: FileSystem) -> None:
        self._disk = disk
        self._block_bytes = system.block_bytes
        self._pieces = system.pieces(system.inode(system.journal_inode))
        self._starts = [start for start, _place, _length in self._pieces]
        head = self._read(0)
        magic, kind, _sequence, block_bytes, self._end, self._first = struct.unpack_from(">IIIIII", head, 0)
        self._sequence, self._start = struct.unpack_from(">II", head, 24)
        self._features = struct.unpack_from(">I", head, 40)[0] if kind == 4 else 0
        if magic != _MAGIC or kind not in (3, 4) or block_bytes != self._block_bytes or not 0 < self._first < self._end:
            raise Refused("the journal of its ext4 file system is damaged")
        if self._features & ~_KNOWN:
            raise Refused(
                f"the journal of its ext4 file system has features that hvctl does not read ({self._features:#x})"
            )

    def list_newer(self) -> Iterator[tuple[int, tuple[int, bool]]]:
        """Block, and where its newest content is; the last of several is the one that counts."""
        log = self._list_committed()
        revoked: dict[int, int] = {}
        for block in log:
            if block.kind == _REVOKE:
                revoked.update((number, block.sequence) for number in self._parse_revoked(block.content))
        for block in log:
            if block.kind != _DESCRIPTOR:
                continue
            at = block.at
            for number, flags in self._parse_tags(block.content):
                at = self._next(at)
                if block.sequence > revoked.get(number, -1):
                    yield number, (self._place(at), bool(flags & _MASKED))

    def _list_committed(self) -> list[_Block]:
        committed: list[_Block] = []
        waiting: list[_Block] = []
        at, sequence = self._start, self._sequence
        for _step in range(self._end if at else 0):
            content = self._read(at)
            magic, kind, found = struct.unpack_from(">III", content, 0)
            if magic != _MAGIC or found != sequence:
                break
            waiting.append(_Block(kind, sequence, content, at))
            if kind == _COMMIT:
                committed += waiting
                waiting, sequence = [], sequence + 1
            elif kind == _DESCRIPTOR:
                for _tag in self._parse_tags(content):
                    at = self._next(at)
            elif kind != _REVOKE:
                break
            at = self._next(at)
        return committed

    def _parse_tags(self, content: bytes) -> Iterator[tuple[int, int]]:
        """Block and flags of each."""
        is_64, at = bool(self._features & _64BIT), _HEADER_BYTES
        end = len(content) - (4 if self._features & (_CHECKSUMS_2 | _CHECKSUMS_3) else 0)
        length = 8 + 2 * bool(self._features & _CHECKSUMS_2) + 4 * is_64
        length = 16 if self._features & _CHECKSUMS_3 else length
        while at + length <= end:
            if self._features & _CHECKSUMS_3:
                number, flags, high = struct.unpack_from(">III", content, at)
            else:
                number, _checksum, flags = struct.unpack_from(">IHH", content, at)
                high = struct.unpack_from(">I", content, at + 8)[0] if is_64 else 0
            yield number | (high << 32 if is_64 else 0), flags
            if flags & _LAST:
                return
            at += length + (0 if flags & _SAME_UUID else _UUID_BYTES)

    def _parse_revoked(self, content: bytes) -> list[int]:
        (used,) = struct.unpack_from(">I", content, _HEADER_BYTES)
        entry = struct.Struct(">Q" if self._features & _64BIT else ">I")
        places = range(_HEADER_BYTES + 4, min(used, len(content)) - entry.size + 1, entry.size)
        return [entry.unpack_from(content, at)[0] for at in places]

    def _next(self, at: int) -> int:
        return at + 1 if at + 1 < self._end else self._first

    def _read(self, number: int) -> bytes:
        content = self._disk.read(self._place(number), self._block_bytes)
        if len(content) != self._block_bytes:
            raise Refused("the journal of its ext4 file system is cut short")
        return content

    def _place(self, number: int) -> int:
        """Where a block of the journal is on the disk."""
        offset = number * self._block_bytes
        index = bisect_right(self._starts, offset) - 1
        start, place, length = self._pieces[index] if index >= 0 else (0, 0, 0)
        if offset + self._block_bytes > start + length:
            raise Refused("the journal of its ext4 file system has holes")
        return place + offset - start
