"""What is on a disk: its partitions (GPT, MBR) or the one file system that it is, and which of them is a root.

Read from a file as it is, trusting nothing: a table that makes no sense has no partitions.
"""

from __future__ import annotations

import functools
import struct
import uuid
from collections.abc import Iterator

from hvctl.hostside.diskview import Disk
from hvctl.hostside.ext4 import ROOT, FileSystem
from hvctl.hostside.refusal import Refused
from hvctl.values import dataclass

_SECTOR = 512
_MOST_PARTITIONS = 128
_EXTENDED = (0x05, 0x0F, 0x85)
_ROOT_TYPES = ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709",)  # x86-64 root: Discoverable Partitions Specification
# Where a file system, or what holds one, says what it is: offset, bytes, name.
_MAGICS = (
    (1080, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (512, b"LABELONE", "LVM"),
    (0, b"hsqs", "squashfs"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (4086, b"SWAPSPACE2", "swap"),
    (82, b"FAT32", "FAT"),
    (54, b"FAT1", "FAT"),
    (3, b"NTFS    ", "NTFS"),
)


@dataclass(frozen=True)
class Part:
    """A stretch of a disk and what is in it."""

    offset: int
    size: int
    kind: str
    """`ext4` (2 and 3, too), `xfs`, ..., or empty: unknown."""
    is_root_type: bool = False
    """Whether the table says that it is a root."""
    is_root: bool = False
    """Whether a Linux system is in it, as far as it can be read here."""
    needs_recovery: bool = False
    problem: str = ""
    """Why it cannot be read, where its kind could."""


def survey(disk: Disk, *, ignoring_journals: bool = False) -> list[Part]:
    """All parts of a disk, in their order; without a table the whole disk is one.

    `ignoring_journals`: the disk shows what they have still to write already.
    """
    spans = list(_find_gpt(disk)) or list(_find_mbr(disk))
    look = functools.partial(_look, disk, ignoring_journal=ignoring_journals)
    whole = look(0, disk.size, is_root_type=False)
    if whole.kind or not spans:  # a boot sector alone makes no table: FAT and NTFS have its mark, too
        return [whole]
    return [look(offset, length, is_root_type=is_root) for offset, length, is_root in spans]


def choose_root(parts: list[Part]) -> Part | None:
    """The one to start: what is a root for certain, then what may be one and cannot be read here; the largest of those."""
    able = [part for part in parts if part.is_root or part.problem or part.kind in ("xfs", "btrfs")]
    return max(able, key=lambda part: (part.is_root, part.is_root_type, part.size), default=None)


def _look(disk: Disk, offset: int, size: int, *, is_root_type: bool, ignoring_journal: bool) -> Part:
    kind = next((name for at, magic, name in _MAGICS if _read(disk, offset + at, len(magic)) == magic), "")
    if kind != "ext4":
        return Part(offset, size, kind, is_root_type)
    needs_recovery = False
    try:
        system = FileSystem(disk, offset, size)
        needs_recovery = system.needs_recovery and not ignoring_journal
        system.check(ignoring_journal=ignoring_journal)
        return Part(offset, size, kind, is_root_type, is_root=_has_system(system))
    except Refused as error:
        return Part(offset, size, kind, is_root_type, needs_recovery=needs_recovery, problem=str(error))


def _has_system(system: FileSystem) -> bool:
    """Whether it has etc/os-release, which every Linux system has: usually a link."""
    top = dict(system.entries(system.inode(ROOT)))
    etc = system.inode(top[b"etc"]) if b"etc" in top else None
    return etc is not None and etc.mode >> 12 == 4 and b"os-release" in dict(system.entries(etc))


def _find_gpt(disk: Disk) -> Iterator[tuple[int, int, bool]]:
    """Offset, size, and whether it is a root by type. UEFI 2.10, 5.3."""
    header = _read(disk, _SECTOR, 92)
    if header[:8] != b"EFI PART" or len(header) < 92:
        return
    table, count, length = struct.unpack_from("<QII", header, 72)
    if not 128 <= length <= 4096:
        return
    for number in range(min(count, _MOST_PARTITIONS)):
        entry = _read(disk, table * _SECTOR + number * length, 128)
        if len(entry) < 128 or entry[:16] == bytes(16):
            continue
        first, last = struct.unpack_from("<QQ", entry, 32)
        if 0 < first <= last and (last + 1) * _SECTOR <= disk.size:
            kind = str(uuid.UUID(bytes_le=entry[:16]))
            yield first * _SECTOR, (last + 1 - first) * _SECTOR, kind in _ROOT_TYPES


def _find_mbr(disk: Disk) -> Iterator[tuple[int, int, bool]]:
    """The four of a DOS table, and those of the chain in an extended one."""
    extended = 0
    for kind, first, count in _read_mbr(disk, 0):
        if kind in _EXTENDED:
            extended = first
        elif kind and (first + count) * _SECTOR <= disk.size:
            yield first * _SECTOR, count * _SECTOR, False
    here = extended
    for _step in range(_MOST_PARTITIONS if extended else 0):
        following = 0
        for kind, first, count in _read_mbr(disk, here)[:2]:
            if kind in _EXTENDED:
                following = extended + first
            elif kind and (here + first + count) * _SECTOR <= disk.size:
                yield (here + first) * _SECTOR, count * _SECTOR, False
        if not following:
            return
        here = following


def _read_mbr(disk: Disk, sector: int) -> list[tuple[int, int, int]]:
    """Type, first sector, count of sectors for each entry in use."""
    block = _read(disk, sector * _SECTOR, _SECTOR)
    if block[510:] != b"\x55\xaa":
        return []
    entries = [struct.unpack_from("<II", block, 446 + 16 * number + 8) for number in range(4)]
    kinds = [block[446 + 16 * number + 4] for number in range(4)]
    return [(kind, *entry) for kind, entry in zip(kinds, entries, strict=True) if kind and entry[0] and entry[1]]


def _read(disk: Disk, offset: int, size: int) -> bytes:
    return disk.read(offset, size) if 0 <= offset < 1 << 62 else b""
