"""An ext2, ext3 or ext4 file system, read from a disk without the kernel and without trusting any of it.

Not by e2fsprogs: what `debugfs rdump` writes has lost hard links and extended attributes, and `fuse2fs` with tar takes
ten times as long. Layout: Documentation/filesystems/ext4 of the kernel. Checksums are not looked at: they protect from
accidents, and whoever means harm computes them anew. A journal that is to be replayed is refused (`journal.py` shows the
disk as it is then, e2fsck replays it).
"""

from __future__ import annotations

import functools
import stat
import struct
from collections.abc import Iterator

from hvctl.hostside.diskview import Disk
from hvctl.hostside.refusal import Refused
from hvctl.values import dataclass

ROOT = 2
_MAGIC = 0xEF53
# incompat: filetype, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data.
_KNOWN = 0x2 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000
_RECOVER, _64BIT = 0x4, 0x80
_UNKNOWN_NAMES = {0x1: "compression", 0x8: "a journal of another file system", 0x10: "meta_bg", 0x10000: "encryption",
                  0x20000: "names without regard to case"}  # fmt: skip
_EXTENTS, _INLINE, _ENCRYPTED = 0x80000, 0x10000000, 0x800
_EXTENT_MAGIC, _ATTRIBUTES_MAGIC = 0xF30A, 0xEA020000
_DEEPEST_EXTENTS = 5
_UNWRITTEN = 32768
_PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.",
             6: b"security.", 7: b"system.", 8: b"system.richacl"}  # fmt: skip
_INLINE_REST = b"system.data"
_ACL_WITH_ID = (2, 8)  # ACL_USER, ACL_GROUP
_MOST_DIRECTORY_BYTES = 256 * 1024**2
_MOST_ATTRIBUTE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Inode:
    """What an inode says of its file."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    mtime_ns: int
    flags: int
    map: bytes
    """i_block: where its content is, or the content."""
    attributes: tuple[tuple[bytes, bytes], ...]
    """Extended attributes by full name, without what is inline content."""
    inline_rest: bytes
    """What did not fit into `map` of inline content."""

    @property
    def has_content_inside(self) -> bool:
        """Whether its content is in `map` and `inline_rest`."""
        return bool(self.flags & _INLINE)

    @property
    def lists_its_extents(self) -> bool:
        """Whether `map` alone says where its content is."""
        return bool(self.flags & _EXTENTS) and self.map[6:8] == b"\0\0"


class FileSystem:
    """One file system on a disk. Raises Refused for anything that cannot be right."""

    def __init__(self, disk: Disk, offset: int, size: int) -> None:
        """It begins at `offset` and has `size` bytes there."""
        self.disk = disk
        self._offset = offset
        self._size = size
        block = self._read(1024, 1024)
        self.has_magic = struct.unpack_from("<H", block, 0x38)[0] == _MAGIC
        (self.incompatible,) = struct.unpack_from("<I", block, 0x60)
        self.block_bytes: int
        self._inode_count, blocks_low = struct.unpack_from("<II", block, 0)
        self._first_block, log_size = struct.unpack_from("<II", block, 0x14)
        self.block_bytes = 1024 << min(log_size, 16)
        self._inodes_per_group = struct.unpack_from("<I", block, 0x28)[0]
        revision = struct.unpack_from("<I", block, 0x4C)[0]
        self.inode_bytes = struct.unpack_from("<H", block, 0x58)[0] if revision else 128
        (self.journal_inode,) = struct.unpack_from("<I", block, 0xE0)
        is_64 = bool(self.incompatible & _64BIT)
        self._descriptor_bytes = struct.unpack_from("<H", block, 0xFE)[0] if is_64 else 32
        self._block_count = blocks_low + ((struct.unpack_from("<I", block, 0x150)[0] << 32) if is_64 else 0)
        self._group = functools.lru_cache(maxsize=1024)(self._read_group)
        self._inode_block = functools.lru_cache(maxsize=256)(self._read_block)

    @property
    def layout(self) -> tuple[int, int, int]:
        """What the numbers in an inode are counted in, and from where."""
        return self._offset, self.block_bytes, self.inode_bytes

    @property
    def needs_recovery(self) -> bool:
        """Whether its journal is to be replayed first."""
        return bool(self.incompatible & _RECOVER)

    def check(self, *, ignoring_journal: bool = False) -> None:
        """Raise Refused for a file system that cannot be read here; before anything else is asked."""
        if not self.has_magic:
            raise Refused("there is no ext4 file system")
        unknown = self.incompatible & ~_KNOWN & ~_RECOVER
        if unknown:
            names = [_UNKNOWN_NAMES.get(1 << bit, f"feature {1 << bit:#x}") for bit in range(32) if unknown >> bit & 1]
            raise Refused(f"its ext4 file system has {', '.join(names)}, which hvctl does not read")
        if self.needs_recovery and not ignoring_journal:
            raise Refused("the journal of its ext4 file system is not empty")
        is_sane = (
            self.block_bytes <= 65536
            and 128 <= self.inode_bytes <= self.block_bytes
            and self.inode_bytes & (self.inode_bytes - 1) == 0
            and 32 <= self._descriptor_bytes <= 1024
            and self._inodes_per_group > 0
            and 0 < self._block_count * self.block_bytes <= self._size
        )
        if not is_sane:
            raise Refused("the superblock of its ext4 file system is damaged, or the disk is cut short")

    def inode(self, number: int, *, with_attributes: bool = True) -> Inode:
        """One inode; without its attributes in a third of the time."""
        raw = self._read_inode(number)
        mode, uid, size, _atime, _ctime, mtime, _dtime, gid, links = struct.unpack_from("<HHIIIiIHH", raw, 0)
        flags = struct.unpack_from("<I", raw, 0x20)[0]
        acl_low, size_high = struct.unpack_from("<II", raw, 0x68)
        acl_high, uid_high, gid_high = struct.unpack_from("<HHH", raw, 0x76)
        extra_bytes = struct.unpack_from("<H", raw, 0x80)[0] if len(raw) > 128 else 0
        mtime_ns = mtime * 10**9
        if extra_bytes >= 12:
            extra = struct.unpack_from("<I", raw, 0x88)[0]
            mtime_ns = (mtime + ((extra & 3) << 32)) * 10**9 + min(extra >> 2, 10**9 - 1)
        found: dict[bytes, bytes] = {}
        if with_attributes or flags & _INLINE:
            found.update(self._inner_attributes(raw, extra_bytes))
            found.update(self._outer_attributes(acl_low | acl_high << 32))
        rest = found.pop(_INLINE_REST, b"")
        is_large = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        return Inode(
            number=number,
            mode=mode,
            uid=uid | uid_high << 16,
            gid=gid | gid_high << 16,
            size=size | (size_high << 32 if is_large else 0),
            links=links,
            mtime_ns=mtime_ns,
            flags=flags,
            map=raw[0x28:0x64],
            attributes=tuple(sorted(found.items())),
            inline_rest=rest,
        )

    def entries(self, inode: Inode) -> list[tuple[bytes, int]]:
        """Names and inodes of a directory, sorted, without `.` and `..`."""
        if inode.flags & _ENCRYPTED:
            raise Refused("it has encrypted directories")
        if inode.flags & _INLINE:
            blocks = [inode.map[4:], inode.inline_rest]
        else:
            if inode.size > _MOST_DIRECTORY_BYTES:
                raise Refused(f"a directory of {inode.size} bytes is too long")
            blocks = [self._read(start, self.block_bytes) for start in self._directory_blocks(inode)]
        found: dict[bytes, int] = {}
        for block in blocks:
            for name, number in _parse_entries(block):
                if name in found:
                    raise Refused("a directory has a name twice")
                found[name] = number
        return sorted(found.items())

    def pieces(self, inode: Inode) -> list[tuple[int, int, int]]:
        """Of a file: (offset in it, offset in the disk, length) of what is not a hole, ascending, adjoining ones joined."""
        found: list[list[int]] = []
        for logical, physical, count in self._runs(inode):
            start, end = logical * self.block_bytes, min((logical + count) * self.block_bytes, inode.size)
            if end <= start:
                continue
            place = self._offset + physical * self.block_bytes
            if found and start < found[-1][0] + found[-1][2]:
                raise Refused("a file has overlapping extents")
            if found and found[-1][0] + found[-1][2] == start and found[-1][1] + found[-1][2] == place:
                found[-1][2] += end - start
            else:
                found.append([start, place, end - start])
        return [(start, place, length) for start, place, length in found]

    def inline_content(self, inode: Inode) -> bytes | None:
        """The content of a file that lies in its inode, or None."""
        if not inode.flags & _INLINE:
            return None
        content = (inode.map + inode.inline_rest)[: inode.size]
        if len(content) != inode.size:
            raise Refused("a file's content in its inode is cut short")
        return content

    def link(self, inode: Inode) -> bytes:
        """Where a symbolic link points."""
        if not 0 < inode.size < 4096:
            raise Refused("a symbolic link has an impossible length")
        inline = self.inline_content(inode)
        if inline is not None:
            return inline
        if inode.size < 60 and not inode.flags & _EXTENTS:
            return inode.map[: inode.size]
        pieces = self.pieces(inode)
        if not pieces or (pieces[0][0], pieces[0][2]) != (0, inode.size):
            raise Refused("a symbolic link has holes")
        return self._read(pieces[0][1] - self._offset, inode.size)

    def _directory_blocks(self, inode: Inode) -> Iterator[int]:
        for logical, physical, count in self._runs(inode):
            for number in range(count):
                if (logical + number) * self.block_bytes < inode.size:
                    yield (physical + number) * self.block_bytes

    def _runs(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """(logical block, physical block, count), ascending, without holes."""
        runs = self._extents(inode.map, _DEEPEST_EXTENTS) if inode.flags & _EXTENTS else self._indirect(inode)
        for logical, physical, count in runs:
            if not physical > 0 or physical + count > self._block_count:
                raise Refused("a file lies outside its file system")
            yield logical, physical, count

    def _extents(self, node: bytes, most_deep: int) -> Iterator[tuple[int, int, int]]:
        magic, count, _most, depth = struct.unpack_from("<HHHH", node, 0)
        if magic != _EXTENT_MAGIC or depth > most_deep or 12 + 12 * count > len(node):
            raise Refused("a file's extents are damaged")
        for at in range(12, 12 + 12 * count, 12):
            if depth == 0:
                logical, length, high, low = struct.unpack_from("<IHHI", node, at)
                if length <= _UNWRITTEN:  # else it has blocks, but they read as zeros
                    yield logical, low | high << 32, length
            else:
                _logical, low, high = struct.unpack_from("<IIH", node, at)
                yield from self._extents(self._read_block(low | high << 32), depth - 1)

    def _indirect(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        numbers = struct.unpack("<15I", inode.map)
        per_block = self.block_bytes // 4
        last = -(-inode.size // self.block_bytes)
        for logical, physical in enumerate(numbers[:12]):
            if physical and logical < last:
                yield logical, physical, 1
        logical, span = 12, 1
        for number in numbers[12:]:
            span *= per_block
            if number and logical < last:
                yield from self._indirect_below(number, logical, span // per_block, last)
            logical += span

    def _indirect_below(self, block: int, logical: int, span: int, last: int) -> Iterator[tuple[int, int, int]]:
        for (number,) in struct.iter_unpack("<I", self._read_block(block)):
            if logical >= last:
                return
            if number and span == 1:
                yield logical, number, 1
            elif number:
                yield from self._indirect_below(number, logical, span // (self.block_bytes // 4), last)
            logical += span

    def _inner_attributes(self, raw: bytes, extra_bytes: int) -> Iterator[tuple[bytes, bytes]]:
        start = 128 + extra_bytes
        if len(raw) < start + 4 or struct.unpack_from("<I", raw, start)[0] != _ATTRIBUTES_MAGIC:
            return
        values = raw[start + 4 :]
        yield from self._parse_attributes(values, 0)

    def _outer_attributes(self, block: int) -> Iterator[tuple[bytes, bytes]]:
        if block == 0:
            return
        content = self._read_block(block)
        if struct.unpack_from("<I", content, 0)[0] != _ATTRIBUTES_MAGIC:
            raise Refused("a file's extended attributes are damaged")
        yield from self._parse_attributes(content, 32)

    def _parse_attributes(self, content: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
        while at + 16 <= len(content) and content[at : at + 4] != b"\0\0\0\0":
            length, index, offset, inode, size = struct.unpack_from("<BBHII", content, at)
            name = _PREFIXES.get(index, b"") + content[at + 16 : at + 16 + length]
            if size > _MOST_ATTRIBUTE_BYTES or index not in _PREFIXES:
                raise Refused("a file's extended attributes are damaged")
            value = self._attribute_inode(inode, size) if inode else content[offset : offset + size]
            if len(value) != size:
                raise Refused("a file's extended attributes are damaged")
            yield name, _parse_acl(value) if index in (2, 3) else value
            at += 16 + (length + 3) // 4 * 4

    def _attribute_inode(self, number: int, size: int) -> bytes:
        raw = self._read_inode(number)
        flags = struct.unpack_from("<I", raw, 0x20)[0]
        inode = Inode(number, 0, 0, 0, size, 0, 0, flags, raw[0x28:0x64], (), b"")
        parts = [self._read(place - self._offset, length) for _start, place, length in self.pieces(inode)]
        return b"".join(parts)

    def place_inode(self, number: int) -> int:
        """Where on the disk an inode is."""
        block, start = self._place_inode(number)
        return self._offset + block * self.block_bytes + start

    def _read_inode(self, number: int) -> bytes:
        block, start = self._place_inode(number)
        return self._inode_block(block)[start : start + self.inode_bytes]

    def _place_inode(self, number: int) -> tuple[int, int]:
        """Its block, and where in that it begins."""
        if not 0 < number <= self._inode_count:
            raise Refused("a name stands for an inode that cannot be")
        group, index = divmod(number - 1, self._inodes_per_group)
        block, start = divmod(index * self.inode_bytes, self.block_bytes)
        return self._group(group) + block, start

    def _read_group(self, group: int) -> int:
        """The first block of its inodes."""
        start = (self._first_block + 1) * self.block_bytes + group * self._descriptor_bytes
        raw = self._read(start, self._descriptor_bytes)
        high = struct.unpack_from("<I", raw, 0x28)[0] if self._descriptor_bytes >= 64 else 0
        return int(struct.unpack_from("<I", raw, 8)[0]) | high << 32

    def _read_block(self, number: int) -> bytes:
        if not 0 < number < self._block_count:
            raise Refused("a block lies outside its file system")
        return self._read(number * self.block_bytes, self.block_bytes)

    def _read(self, start: int, size: int) -> bytes:
        if start + size > self._size:
            raise Refused("its ext4 file system is cut short")
        found = self.disk.read(self._offset + start, size)
        if len(found) != size:
            raise Refused("its ext4 file system is cut short")
        return found


def _parse_entries(block: bytes) -> Iterator[tuple[bytes, int]]:
    at = 0
    while at + 8 <= len(block):
        number, length, name_length = struct.unpack_from("<IHB", block, at)
        step = len(block) if length in (0, 65535) and len(block) == 65536 else length
        if step < 8 or step % 4 or at + step > len(block) or 8 + name_length > step:
            raise Refused("a directory is damaged")
        name = block[at + 8 : at + 8 + name_length]
        if number and name not in (b".", b".."):
            if not name or b"/" in name or b"\0" in name:
                raise Refused("a directory has a name that cannot be")
            yield name, number
        at += step


def _parse_acl(value: bytes) -> bytes:
    """An access list as programs see it (acl(5), struct posix_acl_xattr_header), from ext4's shorter form."""
    found = [struct.pack("<I", 2)]
    at = 4
    while at + 4 <= len(value):
        tag, permissions = struct.unpack_from("<HH", value, at)
        at += 4
        number = 0xFFFFFFFF
        if tag in _ACL_WITH_ID:
            if at + 4 > len(value):
                raise Refused("an access list is damaged")
            (number,) = struct.unpack_from("<I", value, at)
            at += 4
        found.append(struct.pack("<HHI", tag, permissions, number))
    return b"".join(found)
