"""Disks as they are read here: a file as it is, a stack of qcow2 files as its guest sees it, either with a journal replayed.

Of two disks that share files it can be told without reading where they are the same. A qcow2 file here is one that this
host wrote; its layout is docs/interop/qcow2.txt of QEMU. What is in the disks is not looked at.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from hvctl.hostside.refusal import Refused

_HEADER = struct.Struct(">4sI12xIQIIQ24xQ")
_MAGIC = b"QFI\xfb"
_ALLOCATED, _COMPRESSED, _ZERO = 0x00FF_FFFF_FFFF_FE00, 1 << 62, 1
_MOST_L1_BYTES = 32 * 1024**2
_RAW_GRAIN_BYTES = 65536
_MAGIC_OF_JOURNALS = bytes.fromhex("c03b3998")


class Place(NamedTuple):
    """Where the bytes of a disk are: in which file, and from which byte on; None: nowhere, they are zeros."""

    file: Raw | Qcow2 | None
    offset: int


_NOWHERE = Place(None, 0)


class Disk(Protocol):
    """Something with bytes at offsets."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """What is there; less, or nothing, at its end."""

    def places(self, offset: int, size: int) -> list[Place] | None:
        """Where that comes from, in pieces of one length; None where it is not known."""


def is_same(one: Disk, other: Disk, offset: int, size: int) -> bool:
    """Whether two disks have the very same bytes of the very same files there. Nothing is read; False is no proof."""
    places = one.places(offset, size)
    return places is not None and places == other.places(offset, size)


class Raw:
    """A file that is a disk as it is."""

    grain_bytes = _RAW_GRAIN_BYTES

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset) if 0 <= offset < 1 << 62 else b""

    def places(self, offset: int, size: int) -> list[Place] | None:
        return [Place(self, offset)]

    def find(self, offset: int) -> Place:
        """Where a byte of the disk is."""
        return Place(self, offset) if offset < self.size else _NOWHERE


class Qcow2:
    """One file of a stack: what it has, whatever it stands on. Raises Refused for what hvctl does not write."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        header = os.pread(descriptor, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            raise Refused("a layer of its disk is cut short")
        magic, version, bits, self.size, encryption, entries, offset, incompatible = _HEADER.unpack(header)
        if magic != _MAGIC or encryption or not 9 <= bits <= 21 or 8 * entries > _MOST_L1_BYTES:
            raise Refused("a layer of its disk is damaged")
        if version >= 3 and incompatible:
            raise Refused(f"a layer of its disk has features that hvctl does not read ({incompatible:#x})")
        self.grain_bytes = 1 << bits
        self._per_table = self.grain_bytes // 8
        content = os.pread(descriptor, 8 * entries, offset)
        self._tables = struct.unpack(f">{len(content) // 8}Q", content[: len(content) // 8 * 8])
        self._table = functools.lru_cache(maxsize=64)(self._read_table)

    def read(self, offset: int, size: int) -> bytes:
        """Of the file, not of the disk."""
        return os.pread(self._descriptor, size, offset).ljust(size, b"\0")  # its last cluster may not be there whole

    def find(self, offset: int) -> Place | None:
        """Where a byte of the disk is; None: not in this file."""
        if offset >= self.size:
            return _NOWHERE
        number, within = divmod(offset, self.grain_bytes)
        high, low = divmod(number, self._per_table)
        table = self._tables[high] & _ALLOCATED if high < len(self._tables) else 0
        if not table:
            return None
        entry = self._table(table)[low]
        if entry & _COMPRESSED:
            raise Refused("a layer of its disk is compressed")
        if entry & _ZERO:
            return _NOWHERE
        return Place(self, (entry & _ALLOCATED) + within) if entry & _ALLOCATED else None

    def _read_table(self, offset: int) -> tuple[int, ...]:
        return struct.unpack(f">{self._per_table}Q", self.read(offset, self.grain_bytes))


class Chain:
    """A disk that is a stack of files, topmost first."""

    def __init__(self, files: Sequence[Raw | Qcow2]) -> None:
        self._files = files
        self._grain_bytes = min(file.grain_bytes for file in files)
        self._places: dict[int, Place] = {}
        self.size = files[0].size

    def read(self, offset: int, size: int) -> bytes:
        found = []
        end = min(offset + size, self.size)
        while offset < end:
            number, within = divmod(offset, self._grain_bytes)
            count = min(self._grain_bytes - within, end - offset)
            file, start = self._places.get(number) or self._find(number)
            found.append(file.read(start + within, count).ljust(count, b"\0") if file else bytes(count))
            offset += count
        return found[0] if len(found) == 1 else b"".join(found)

    def places(self, offset: int, size: int) -> list[Place] | None:
        first, last = offset // self._grain_bytes, (offset + size - 1) // self._grain_bytes
        return [self._places.get(number) or self._find(number) for number in range(first, last + 1)]

    def _find(self, number: int) -> Place:
        found: Place | None = None
        for file in self._files:
            found = file.find(number * self._grain_bytes)
            if found is not None:
                break
        self._places[number] = place = found or _NOWHERE
        return place


class Replayed:
    """A disk with what the journal of one of its file systems has newer; that is in the journal, on the same disk."""

    def __init__(self, disk: Disk, start: int, block_bytes: int, newer: Mapping[int, tuple[int, bool]]) -> None:
        """`newer`, by block counted from `start`: where on the disk it is, and whether its beginning was masked there."""
        self._disk = disk
        self._start = start
        self._block_bytes = block_bytes
        self._newer = newer
        self.size = disk.size

    def read(self, offset: int, size: int) -> bytes:
        if not self._touches(offset, size):
            return self._disk.read(offset, size)
        found = []
        end = offset + size
        while offset < end:
            number, within = divmod(offset - self._start, self._block_bytes)
            count = min(self._block_bytes - within, end - offset)
            place, is_masked = self._newer.get(number, (self._start + number * self._block_bytes, False))
            block = self._disk.read(place, self._block_bytes)
            found.append((_MAGIC_OF_JOURNALS + block[4:] if is_masked else block)[within : within + count])
            offset += count
        return b"".join(found)

    def places(self, offset: int, size: int) -> list[Place] | None:
        return None if self._touches(offset, size) else self._disk.places(offset, size)

    def _touches(self, offset: int, size: int) -> bool:
        first, last = (
            (offset - self._start) // self._block_bytes,
            (offset + size - 1 - self._start) // self._block_bytes,
        )
        if last - first > len(self._newer):
            return any(first <= number <= last for number in self._newer)
        return any(number in self._newer for number in range(first, last + 1))
