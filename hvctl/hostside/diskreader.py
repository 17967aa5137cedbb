"""The confined worker that reads a foreign disk.

    survey DISK                        tells its parts as JSON
    pack DISK OFFSET SIZE ARCHIVE      writes the tree of one ext4 file system as a tar archive
    identity DISK OFFSET SIZE          tells what in it is one system's own (`identityfiles.py`), as JSON

The archive is for `unpack`, which trusts it no more than any other; pax headers carry what tar alone cannot. Device nodes
and sockets are left out: nothing in a tree is one. So is an empty /lost+found.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from hvctl.hostside import identityfiles, partitions, refusal
from hvctl.hostside.diskview import Raw
from hvctl.hostside.ext4 import ROOT, FileSystem, Inode
from hvctl.hostside.refusal import Refused

_BLOCK = 512
DEEPEST = 250
TYPES = {stat.S_IFREG: b"0", stat.S_IFLNK: b"2", stat.S_IFDIR: b"5", stat.S_IFIFO: b"6"}
_HARD_LINK = b"1"
_ZEROS = bytes(1024 * 1024)
# A file with fewer bytes of holes than this is written with them: a map costs more.
_LEAST_HOLES_BYTES = 64 * 1024
_MOST_PIECES = 60000


def main(arguments: Sequence[str]) -> None:
    """Do what the first word says."""
    sys.excepthook = refusal.give_up
    verb, disk, *rest = arguments
    descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    if verb == "survey":
        parts = partitions.survey(Raw(descriptor))
        sys.stdout.write(json.dumps([dataclasses.asdict(part) for part in parts]))
        return
    system = FileSystem(Raw(descriptor), int(rest[0]), int(rest[1]))
    system.check()
    if verb == "identity":
        lister = _Lister(system)
        found = {"paths": list(identityfiles.find(lister)), "has_machine_id": lister.has(identityfiles.MACHINE_ID)}
        sys.stdout.write(json.dumps(found))
        return
    with open(rest[2], "xb", buffering=1024 * 1024) as out:
        Packer(system, descriptor, out).pack()


class _Lister:
    """The file system as `identityfiles` looks at it."""

    def __init__(self, system: FileSystem) -> None:
        self._system = system

    def names(self, path: str) -> dict[str, bool]:
        inode = self._system.inode(ROOT)
        for part in path.split("/"):
            number = dict(self._system.entries(inode)).get(part.encode())
            if number is None:
                return {}
            inode = self._system.inode(number)
            if not stat.S_ISDIR(inode.mode):
                return {}
        return {
            os.fsdecode(name): stat.S_ISDIR(self._system.inode(number).mode)
            for name, number in self._system.entries(inode)
        }

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self.names(folder)


class Packer:
    """One tree on its way out."""

    def __init__(self, system: FileSystem, disk: int, out: BinaryIO) -> None:
        self._system = system
        self._disk = disk
        self._out = out
        self._first_names: dict[int, bytes] = {}
        """Of files with several names: the first one."""
        self._directories: set[int] = set()

    def pack(self) -> None:
        """Everything, directories before what is in them, names in their order."""
        for path, inode in self._walk():
            self.write_entry(path, inode)
        self.finish()

    def finish(self) -> None:
        """The archive's end mark."""
        self._out.write(bytes(2 * _BLOCK))

    def _walk(self) -> Iterator[tuple[bytes, Inode]]:
        waiting = [(b"", ROOT, 0)]
        while waiting:
            path, number, depth = waiting.pop()
            inode = self._system.inode(number)
            if stat.S_ISDIR(inode.mode):
                if number in self._directories or depth > DEEPEST:
                    raise Refused("a directory contains itself, or others too deep")
                self._directories.add(number)
                below = self._system.entries(inode)
                if path == b"lost+found/"[:-1] and not below:
                    continue
                prefix = path + b"/" if path else b""
                waiting += [(prefix + name, inner, depth + 1) for name, inner in reversed(below)]
            if stat.S_IFMT(inode.mode) in TYPES:
                yield path, inode

    def write_entry(self, path: bytes, inode: Inode) -> None:
        """One file or directory, whose directory was written before; the second of two names of a file is a link."""
        name = b"./" + path + (b"/" if stat.S_ISDIR(inode.mode) and path else b"")
        records: dict[bytes, bytes] = {b"SCHILY.xattr." + _escape(key): value for key, value in inode.attributes}
        if inode.mtime_ns % 10**9 or not 0 <= inode.mtime_ns < 8**11 * 10**9:
            records[b"mtime"] = _format_time(inode.mtime_ns)
        kind, link = TYPES[stat.S_IFMT(inode.mode)], b""
        if stat.S_ISLNK(inode.mode):
            link = self._system.link(inode)
        if inode.links > 1 and not stat.S_ISDIR(inode.mode):
            first = self._first_names.setdefault(inode.number, path)
            if first != path:
                self._write_header(name, inode, _HARD_LINK, b"./" + first, 0, {})
                return
        if kind != b"0":
            self._write_header(name, inode, kind, link, 0, records)
            return
        self._write_file(name, inode, records)

    def _write_file(self, name: bytes, inode: Inode, records: dict[bytes, bytes]) -> None:
        inline = self._system.inline_content(inode)
        if inline is not None:
            self._write_header(name, inode, b"0", b"", inode.size, records)
            self._out.write(inline + bytes(-len(inline) % _BLOCK))
            return
        pieces = self._system.pieces(inode)
        stored = sum(length for _start, _place, length in pieces)
        if inode.size - stored < _LEAST_HOLES_BYTES or len(pieces) > _MOST_PIECES:
            self._write_header(name, inode, b"0", b"", inode.size, records)
            self._write_whole(pieces, inode.size)
            return
        spans = [(start, length) for start, _place, length in pieces] + [(inode.size, 0)]  # its end, as GNU tar has it
        numbers = [len(spans), *(number for span in spans for number in span)]
        table = "".join(f"{number}\n" for number in numbers).encode()
        table += bytes(-len(table) % _BLOCK)
        records = {**records, b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": name,
                   b"GNU.sparse.realsize": str(inode.size).encode()}  # fmt: skip
        self._write_header(name, inode, b"0", b"", len(table) + stored, records)
        self._out.write(table)
        for _start, place, length in pieces:
            self._copy(place, length)
        self._out.write(bytes(-stored % _BLOCK))

    def _write_whole(self, pieces: list[tuple[int, int, int]], size: int) -> None:
        at = 0
        for start, place, length in pieces:
            self._write_zeros(start - at)
            self._copy(place, length)
            at = start + length
        self._write_zeros(size - at)
        self._out.write(bytes(-size % _BLOCK))

    def _write_zeros(self, count: int) -> None:
        while count > 0:
            self._out.write(_ZEROS[:count])
            count -= len(_ZEROS)

    def _copy(self, place: int, length: int) -> None:
        """From the disk to the stream, by the kernel where it is much."""
        if length <= 16384:
            self._out.write(os.pread(self._disk, length, place))
            return
        self._out.flush()
        while length:
            copied = os.sendfile(self._out.fileno(), self._disk, place, length)
            if not copied:
                raise Refused("the disk is cut short")
            place, length = place + copied, length - copied

    def _write_header(
        self, name: bytes, inode: Inode, kind: bytes, link: bytes, size: int, records: dict[bytes, bytes]
    ) -> None:
        records = dict(records)
        for key, value, most in ((b"path", name, 100), (b"linkpath", link, 100)):
            if len(value) > most:
                records[key] = value
        for key, number, most in ((b"uid", inode.uid, 8**7), (b"gid", inode.gid, 8**7), (b"size", size, 8**11)):
            if number >= most:
                records[key] = str(number).encode()
        if records:
            content = b"".join(_format_record(key, value) for key, value in sorted(records.items()))
            self._out.write(_format_header(b"././@PaxHeader", b"x", len(content)))
            self._out.write(content + bytes(-len(content) % _BLOCK))
        self._out.write(
            _format_header(
                name, kind, size, link, mode=inode.mode & 0o7777, owner=(inode.uid, inode.gid), mtime_ns=inode.mtime_ns
            )
        )


def _format_header(
    name: bytes,
    kind: bytes,
    size: int,
    link: bytes = b"",
    *,
    mode: int = 0o644,
    owner: tuple[int, int] = (0, 0),
    mtime_ns: int = 0,
) -> bytes:
    """One block (pax, ustar Interchange Format). What does not fit stands in a record before it."""
    mtime_s = mtime_ns // 10**9
    numbers = [b"%07o\0" % (number if number < 8**7 else 0) for number in (mode, *owner)]
    numbers += [b"%011o\0" % (number if 0 <= number < 8**11 else 0) for number in (size, mtime_s)]
    head = name[:100].ljust(100, b"\0") + b"".join(numbers)
    tail = (kind + link[:100].ljust(100, b"\0") + b"ustar\x0000").ljust(_BLOCK - 156, b"\0")
    checksum = sum(head) + 8 * 32 + sum(tail)
    return head + b"%06o\0 " % checksum + tail


def _format_record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`; the length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def _escape(name: bytes) -> bytes:
    """An attribute's name without the sign that ends a key in a pax record, as GNU tar has it."""
    return name.replace(b"%", b"%25").replace(b"=", b"%3D")


def _format_time(time_ns: int) -> bytes:
    sign, magnitude = ("-" if time_ns < 0 else ""), abs(time_ns)
    return f"{sign}{magnitude // 10**9}.{magnitude % 10**9:09d}".encode()
