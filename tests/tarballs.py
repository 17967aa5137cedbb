"""Tar archives made byte by byte, so that they can say anything."""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes | str, kind: str = "0", *, size: int | bytes = 0, link: bytes | str = b"", **fields: bytes
) -> bytes:
    """A ustar header with a right checksum. Fields, as they stand there: mode uid gid mtime magic prefix checksum."""
    block = bytearray(BLOCK)

    def put(at: int, value: bytes) -> None:
        block[at : at + len(value)] = value

    put(0, _bytes(name)[:100])
    put(100, fields.get("mode", b"0000644\0"))
    put(108, fields.get("uid", b"0000000\0"))
    put(116, fields.get("gid", b"0000000\0"))
    put(124, size if isinstance(size, bytes) else b"%011o\0" % size)
    put(136, fields.get("mtime", b"00000000001\0"))
    put(156, kind.encode("latin-1"))
    put(157, _bytes(link)[:100])
    put(257, fields.get("magic", b"ustar\x0000"))
    put(345, fields.get("prefix", b""))
    put(386, fields.get("old_sparse", b""))
    put(148, b" " * 8)
    put(148, fields.get("checksum") or b"%06o\0 " % sum(block))
    return bytes(block)


def entry(name: bytes | str, kind: str = "0", content: bytes = b"", **more: bytes | str | int) -> bytes:
    """A header and its content, padded. `size` may lie."""
    more.setdefault("size", len(content))
    return header(name, kind, **more) + pad(content)  # type: ignore[arg-type]


def pax(*records: tuple[str, bytes | str], kind: str = "x") -> bytes:
    """A pax header with these records."""
    return entry("pax", kind, b"".join(record(key, _bytes(value)) for key, value in records))


def record(key: str, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, the length counting itself."""
    rest = b" " + key.encode() + b"=" + value + b"\n"
    size = len(rest) + 1
    while len(b"%d" % size) + len(rest) != size:
        size += 1
    return b"%d" % size + rest


def long_name(name: bytes | str, kind: str = "L") -> bytes:
    """GNU's header for a name (or with K, a link) that is longer than 100 bytes."""
    return entry("././@LongLink", kind, _bytes(name) + b"\0")


def pad(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def tar(*parts: bytes) -> bytes:
    """Entries and the end mark."""
    return b"".join(parts) + END


def zstd(content: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True, timeout=60).stdout


COMPRESS = {
    "plain": lambda content: content,
    "gzip": lambda content: gzip.compress(content, 1),
    "xz": lambda content: lzma.compress(content, preset=0),
    "bzip2": lambda content: bz2.compress(content, 1),
    "zstd": zstd,
}


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
