"""What a disk's header says, read here before any program of QEMU's opens the file.

Accepted are raw disks and plain qcow2 files, version 2 and 3, that stand alone: no backing file, no data file, no
encryption, no feature that we do not know (docs/interop/qcow2.txt of QEMU). Everything else is refused by its name.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

_MIB, _TIB = 1024**2, 1024**4
_QCOW2 = b"QFI\xfb"
_HEAD_BYTES = 1024**2  # header and its extensions lie in the first cluster, whose size is at most 2 MiB
_V2, _V3 = struct.Struct(">4sIQIIQIIQQIIQ"), struct.Struct(">QQQII")
_VIRTUAL_FLOOR_BYTES = 4 * _TIB
_MOST_L1_BYTES = 32 * _MIB  # QCOW_MAX_L1_SIZE
_MOST_REFCOUNT_TABLE_BYTES = 8 * _MIB  # QCOW_MAX_REFTABLE_SIZE
_MOST_SNAPSHOTS = 256
_MOST_EXTENSIONS, _MOST_EXTENSION_BYTES = 16, 64 * 1024

_COMPRESSION, _EXTENDED_L2 = 3, 4
_INCOMPATIBLE = {0: "it was not closed (dirty)", 1: "it is marked as corrupt", 2: "it keeps its data in another file"}
_EXTENSIONS = {0x6803F857: "feature names", 0xE2792ACA: "backing format", 0x23852875: "bitmaps", 0x0537BE77: "LUKS"}

# Offset, bytes there, name; a negative offset counts from the end.
_FOREIGN = (
    (0, b"QFI\xfb\0\0\0\x01", "qcow (version 1)"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (-512, b"conectix", "VHD"),
    (0, b"QED\0", "QED"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
    (-512, b"koly", "DMG"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (257, b"ustar", "tar"),
)


class _Header(NamedTuple):
    """Of version 2, and the beginning of version 3."""

    magic: bytes
    version: int
    backing_offset: int
    backing_bytes: int
    cluster_bits: int
    size: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int


class _Refused(Exception):
    """Says why."""


def examine(path: Path, format: str, most_virtual_bytes: int, most_ratio: int) -> tuple[str, int, str]:
    """The disk's format and virtual size in bytes, and why it is refused, which is empty when it is not.

    `format` is what somebody knows it to be, `raw` or `qcow2`; without it, what is nothing else is raw.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            return "", 0, "it is no regular file"
        head = os.pread(descriptor, _HEAD_BYTES, 0)
        tail = os.pread(descriptor, 512, max(0, facts.st_size - 512))
    finally:
        os.close(descriptor)
    try:
        if format == "raw":
            return "raw", _check_raw(facts.st_size, most_virtual_bytes), ""
        if format not in ("", "qcow2"):
            raise _Refused(f"only qcow2 and raw disks are taken, not {format[:20]!r}")
        if head[:4] == _QCOW2 and head[4:8] != b"\0\0\0\x01":
            return "qcow2", _check_qcow2(head, facts.st_size, most_virtual_bytes, most_ratio), ""
        foreign = find_foreign(head, tail)
        if foreign:
            raise _Refused(f"its format is {foreign}; only qcow2 and raw disks are taken")
        if format == "qcow2":
            raise _Refused("it is no qcow2 file")
        return "raw", _check_raw(facts.st_size, most_virtual_bytes), ""
    except _Refused as refused:
        return "", 0, str(refused)


def find_foreign(head: bytes, tail: bytes) -> str:
    """The name of another format that a file has, by its beginning and its last 512 bytes; empty for none."""
    for offset, magic, name in _FOREIGN:
        if tail[512 + offset :].startswith(magic) if offset < 0 else head[offset:].startswith(magic):
            return name
    return ""


def _check_raw(size: int, most_virtual_bytes: int) -> int:
    if not 0 < size <= most_virtual_bytes:
        raise _Refused(f"a disk of {size} bytes is not possible")
    return (size + 511) // 512 * 512


def _check_qcow2(head: bytes, file_bytes: int, most_virtual_bytes: int, most_ratio: int) -> int:
    """Its virtual size. Field by field in the order of the header."""
    if len(head) < _V2.size:
        raise _Refused("its header is cut short")
    header = _Header._make(_V2.unpack_from(head))
    if header.version not in (2, 3):
        raise _Refused(f"qcow2 version {header.version} is not known")
    if header.backing_offset or header.backing_bytes:
        raise _Refused("it has a backing file")
    if not 9 <= header.cluster_bits <= 21:
        raise _Refused(f"clusters of 2^{header.cluster_bits} bytes are not possible")
    if header.encryption:
        raise _Refused("it is encrypted")
    header_bytes, entry_bytes = _V2.size, 8
    if header.version == 3:
        header_bytes, entry_bytes = _check_version_3(head, header.cluster_bits)
    if not 0 < header.size <= most_virtual_bytes:
        raise _Refused(f"a disk of {header.size} bytes is not possible")
    if header.size > max(_VIRTUAL_FLOOR_BYTES, most_ratio * file_bytes):
        raise _Refused(f"a disk of {header.size} bytes in a file of {file_bytes} is not likely")
    _check_tables(header, entry_bytes, file_bytes)
    _check_extensions(head[header_bytes : 1 << header.cluster_bits])
    return header.size


def _check_tables(header: _Header, entry_bytes: int, file_bytes: int) -> None:
    cluster = 1 << header.cluster_bits
    needed = -(-header.size // (cluster * (cluster // entry_bytes)))
    if not needed <= header.l1_entries <= _MOST_L1_BYTES // 8:
        raise _Refused(f"its table of {header.l1_entries} entries does not fit its size")
    if not 0 < header.refcount_clusters <= max(1, _MOST_REFCOUNT_TABLE_BYTES // cluster):
        raise _Refused(f"a reference table of {header.refcount_clusters} clusters is not possible")
    if header.snapshots > _MOST_SNAPSHOTS:
        raise _Refused(f"it has {header.snapshots} internal snapshots")
    tables = [
        ("table", header.l1_offset, header.l1_entries * 8),
        ("reference table", header.refcount_offset, header.refcount_clusters * cluster),
    ]
    if header.snapshots:
        tables.append(("list of snapshots", header.snapshots_offset, 40 * header.snapshots))
    for what, offset, length in tables:
        # The last table may end in a cluster that the file does not hold whole.
        if offset < cluster or offset % cluster or offset + length > file_bytes + cluster:
            raise _Refused(f"its {what} lies outside the file")


def _check_version_3(head: bytes, cluster_bits: int) -> tuple[int, int]:
    """Length of the header and of an entry of a table of clusters."""
    if len(head) < _V2.size + _V3.size:
        raise _Refused("its header is cut short")
    incompatible, _compatible, _autoclear, refcount_order, header_bytes = _V3.unpack_from(head, _V2.size)
    for bit in range(64):
        if incompatible >> bit & 1 and bit not in (_COMPRESSION, _EXTENDED_L2):
            raise _Refused(_INCOMPATIBLE.get(bit, f"it needs a feature that is not known (bit {bit})"))
    if refcount_order > 6:
        raise _Refused(f"reference counts of 2^{refcount_order} bits are not possible")
    if header_bytes % 8 or not 104 <= header_bytes <= min(1 << cluster_bits, 4096) or header_bytes > len(head):
        raise _Refused(f"a header of {header_bytes} bytes is not possible")
    compression = head[104] if header_bytes > 104 else 0
    if compression > 1 or bool(compression) != bool(incompatible >> _COMPRESSION & 1):
        raise _Refused(f"its kind of compression is not known ({compression})")
    has_extended = bool(incompatible >> _EXTENDED_L2 & 1)
    if has_extended and cluster_bits < 14:
        raise _Refused("its clusters are too small for extended tables")
    return header_bytes, 16 if has_extended else 8


def _check_extensions(rest: bytes) -> None:
    """Header extensions: type, length, content padded to 8 bytes; type 0 ends them."""
    position = 0
    for _number in range(_MOST_EXTENSIONS):
        if position >= len(rest):
            return
        if position + 8 > len(rest):
            raise _Refused("its header extensions do not end")
        kind, length = struct.unpack_from(">II", rest, position)
        if kind == 0:
            return
        if kind not in _EXTENSIONS:
            raise _Refused(f"it has a header extension that is not known ({kind:#010x})")
        if _EXTENSIONS[kind] == "LUKS":
            raise _Refused("it is encrypted")
        if length > _MOST_EXTENSION_BYTES or position + 8 + length > len(rest):
            raise _Refused(f"a header extension of {length} bytes is not possible")
        position += 8 + (length + 7) // 8 * 8
    raise _Refused(f"it has more than {_MOST_EXTENSIONS} header extensions")
