"""The entries of a tar stream, read without trusting any of it.

Read here rather than by `tarfile`, which keeps every entry in memory and takes headers of any size.
Formats: v7, ustar, GNU (long names, base-256 numbers, sparse files) and pax (POSIX.1-2001; attributes as SCHILY.xattr
and LIBARCHIVE.xattr, sparse files 0.1 and 1.0). Global pax headers are comments to us, as they are to Go's reader.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from hvctl.hostside.bytestream import Stream
from hvctl.hostside.refusal import Refused, quote

BLOCK = 512
_MOST_HEADER_BYTES = 1024**2
_MOST_HEADERS = 8
MOST_PIECES = 65536
"""Of one sparse file."""
_ZEROS = bytes(BLOCK)
_TIME = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]{0,30}))?")
_LATEST_S = 1 << 34
_MOST_ID = (1 << 32) - 2


class Kind(Enum):
    """What an entry is."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    DIRECTORY = "directory"
    FIFO = "FIFO"
    DEVICE = "device"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.DEVICE,
    b"4": Kind.DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
    b"S": Kind.FILE,
}


class Entry(NamedTuple):
    """One entry; the content of a file follows in the stream."""

    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    """Bytes of content in the stream, 0 for everything but files."""
    link: bytes
    attributes: tuple[tuple[bytes, bytes], ...]
    pieces: tuple[tuple[int, int], ...] | None
    """Of a sparse file: offset and length of what is in the stream."""
    full_size: int
    """The file's size with its holes."""


def read_entries(stream: Stream, *, needs_end: bool) -> Iterator[Entry]:
    """The entries; the caller takes an entry's content from the stream, all of it, before it asks for the next.

    Ends at two blocks of zeros (or one and the end of the stream). Raises Refused for a stream that is no archive, and
    with `needs_end` for one that just stops between two entries.
    """
    extended = _Extended()
    is_first = True
    while True:
        block = stream.take_some(BLOCK)
        if len(block) < BLOCK or block == _ZEROS:
            _check_end(stream, block, extended, needs_end=needs_end)
            return
        _check_sum(block, is_first=is_first)
        is_first = False
        if extended.read(block, stream):
            continue
        entry = _parse(block, extended, stream)
        extended = _Extended()
        yield entry
        stream.copy(-entry.size % BLOCK, None)


def _check_end(stream: Stream, block: bytes, extended: _Extended, *, needs_end: bool) -> None:
    if extended.count:
        raise Refused("it ends with a header that belongs to nothing")
    if block and block != _ZEROS:
        raise Refused("it is cut short")
    if not block and needs_end:
        raise Refused("it has no end mark: it is cut short, or no archive")
    if block and stream.take_some(BLOCK) not in (b"", _ZEROS):
        raise Refused("it goes on after an end mark")


def _check_sum(block: bytes, *, is_first: bool) -> None:
    field = block[148:156]
    wanted = _number(field, "checksum")
    # Adler-32 has 1 + the sum in its lower half, modulo 65521, and is ten times as fast as sum(). The field itself
    # counts as spaces.
    if zlib.adler32(block) & 0xFFFF != (1 + wanted + sum(field) - 8 * 32) % 65521:
        others = block[:148] + b"        " + block[156:]
        if sum(byte - 256 if byte > 127 else byte for byte in others) != wanted:  # some old ones add signed bytes
            raise Refused("it is no tar archive" if is_first else "a header's checksum is wrong")


def _number(field: bytes, what: str) -> int:
    """A number of a header: octal, or base-256 where the first bit is set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True)
        return value if field[0] == 0xFF else value + (1 << (8 * len(field) - 1))
    text = field[:-1]
    if not text.isdigit():  # nearly all are
        text = field.partition(b"\0")[0].strip()
        if not text:
            return 0
    try:
        return int(text, 8) if text.isdigit() else int("no number")
    except ValueError:
        raise Refused(f"a header's {what} is no number") from None


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


class _Extended:
    """What the headers before an entry's own say about it: GNU's long names, pax's records."""

    __slots__ = ("count", "is_special", "link", "name", "records")

    def __init__(self) -> None:
        self.count = 0
        self.name = b""
        self.link = b""
        self.records: dict[bytes, bytes] = {}
        self.is_special = False
        """Whether a record may be about attributes or holes; most say no more than times."""

    def read(self, block: bytes, stream: Stream) -> bool:
        """Take a header in, if it is such a one."""
        kind = block[156:157]
        if kind not in b"LKxXg" or not kind:
            return False
        self.count += 1
        size = _number(block[124:136], "size")
        if self.count > _MOST_HEADERS:
            raise Refused(f"an entry has more than {_MOST_HEADERS} headers")
        if not 0 <= size <= _MOST_HEADER_BYTES:
            raise Refused(f"a header of {size} bytes is longer than {_MOST_HEADER_BYTES}")
        content = stream.take(size + -size % BLOCK)[:size]
        if kind == b"L":
            self.name = _text(content)
        elif kind == b"K":
            self.link = _text(content)
        elif kind != b"g":
            self.records.update(_parse_records(content))
            self.is_special = self.is_special or b".xattr." in content or b"GNU.sparse." in content
        else:
            self.count -= 1  # belongs to no entry; an archive may end with one
        return True

    def number(self, key: bytes, default: int) -> int:
        """The number that a record gives, else the default."""
        value = self.records.get(key)
        if value is None:
            return default
        if not value.isdigit() or len(value) > 20:
            raise Refused(f"the record {quote(key)} is no number")
        return int(value)


def _parse_records(content: bytes) -> dict[bytes, bytes]:
    """pax records: `LENGTH KEY=VALUE\\n`, the length counting all of itself; an empty value takes a record away."""
    found: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 20)
        digits = content[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        equals = content.find(b"=", space, end)
        if not space < end <= len(content) or equals < 0 or content[end - 1 : end] != b"\n":
            raise Refused("a pax header is damaged")
        found[content[space + 1 : equals]] = content[equals + 1 : end - 1]
        position = end
    return found


def _parse(block: bytes, extended: _Extended, stream: Stream) -> Entry:
    records = extended.records
    flag = block[156:157]
    kind = _KINDS.get(flag)
    name = records.get(b"path") or extended.name or _short_name(block)
    if kind is None:
        raise Refused(f"{quote(name)} is of an unknown type, {flag.decode('latin-1')!a}")
    if flag == b"\0" and name.endswith(b"/"):
        kind = Kind.DIRECTORY
    mode, uid, gid, size = _parse_numbers(block, has_size=kind is Kind.FILE)
    if records:
        size = extended.number(b"size", size) if kind is Kind.FILE else 0
        uid, gid = extended.number(b"uid", uid), extended.number(b"gid", gid)
    if size < 0:
        raise Refused(f"{quote(name)} has a negative size")
    pieces, full_size = None, size
    if kind is Kind.FILE and (
        flag == b"S" or (extended.is_special and any(key.startswith(b"GNU.sparse.") for key in records))
    ):
        name = records.get(b"GNU.sparse.name") or name
        pieces, full_size, size = _parse_sparse(block, extended, stream, size)
    if not (0 <= uid <= _MOST_ID and 0 <= gid <= _MOST_ID):
        raise Refused(f"{quote(name)} has an impossible owner, {uid}:{gid}")
    mtime = records.get(b"mtime")
    return Entry(
        name,
        kind,
        mode & 0o7777,
        uid,
        gid,
        _in_range(_number(block[136:148], "time")) * 10**9 if mtime is None else _parse_time(mtime),
        size,
        records.get(b"linkpath") or extended.link or _text(block[157:257]),
        tuple(_attributes(records)) if extended.is_special else (),
        pieces,
        full_size,
    )


def _parse_numbers(block: bytes, *, has_size: bool) -> tuple[int, int, int, int]:
    """Mode, owner, group and size (0 for what has none) of a header."""
    digits = block[100:107] + block[108:115] + block[116:123] + block[124:135]
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:  # nearly all are
        size = int(digits[21:], 8) if has_size else 0
        return int(digits[:7], 8), int(digits[7:14], 8), int(digits[14:21], 8), size
    size = _number(block[124:136], "size") if has_size else 0
    return _number(block[100:108], "mode"), _number(block[108:116], "owner"), _number(block[116:124], "group"), size


def _short_name(block: bytes) -> bytes:
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        end = 476 if block[508:512] == b"tar\0" else 500  # star keeps times behind a shorter prefix
        return _text(block[345:end]) + b"/" + name
    return name


def _parse_time(value: bytes) -> int:
    match = _TIME.fullmatch(value)
    if match is None:
        raise Refused("the record 'mtime' is no time")
    sign, seconds, fraction = match.groups()
    nanoseconds = int((fraction or b"")[:9].ljust(9, b"0"))
    total = _in_range(int(seconds)) * 10**9 + nanoseconds
    return -total if sign else total


def _in_range(seconds: int) -> int:
    """What file systems keep: 1901 to 2514."""
    return max(-(1 << 31), min(seconds, _LATEST_S))


def _attributes(records: dict[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    for key, value in records.items():
        if key.startswith(b"SCHILY.xattr."):
            # GNU tar writes the sign that ends a key, and its own escape, so.
            yield key[13:].replace(b"%3D", b"=").replace(b"%25", b"%"), value
        elif key.startswith(b"LIBARCHIVE.xattr.") and b"SCHILY.xattr." + unquote_to_bytes(key[17:]) not in records:
            try:
                yield unquote_to_bytes(key[17:]), base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except binascii.Error:
                raise Refused(f"the record {quote(key)} is damaged") from None


def _parse_sparse(
    block: bytes, extended: _Extended, stream: Stream, size: int
) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """Pieces, the size with holes, and how much content is left in the stream; the map itself is taken from there."""
    records = extended.records
    if block[156:157] == b"S":
        full_size = _number(block[483:495], "size")
        numbers = _read_old_map(block, stream)
    elif (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")) == (b"1", b"0"):
        full_size = extended.number(b"GNU.sparse.realsize", 0)
        numbers, used = _read_new_map(stream, size)
        size -= used
    elif b"GNU.sparse.map" in records:
        full_size = extended.number(b"GNU.sparse.size", 0)
        numbers = [_decimal(word) for word in records[b"GNU.sparse.map"].split(b",")]
    else:
        raise Refused("it has a sparse file of an old kind (GNU.sparse 0.0)")
    pieces = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    end = 0
    for offset, length in pieces:
        if offset < end or length < 0:
            raise Refused("the map of a sparse file is damaged")
        end = offset + length
    if len(numbers) % 2 or end > full_size or sum(length for _offset, length in pieces) != size:
        raise Refused("the map of a sparse file is damaged")
    return pieces, full_size, size


def _read_old_map(block: bytes, stream: Stream) -> list[int]:
    numbers: list[int] = []
    fields, more = block[386:482], block[482]
    while True:
        for start in range(0, len(fields), 24):
            if fields[start] == 0:
                break
            numbers += [_number(fields[start + at : start + at + 12], "map") for at in (0, 12)]
        if not more:
            return numbers
        if len(numbers) > 2 * MOST_PIECES:
            raise Refused(f"a sparse file has more than {MOST_PIECES} pieces")
        block = stream.take(BLOCK)
        fields, more = block[:504], block[504]


def _read_new_map(stream: Stream, size: int) -> tuple[list[int], int]:
    """The numbers at the beginning of the content, and how many bytes they take."""
    text = b""
    wanted = 1
    while text.count(b"\n") < wanted:
        if len(text) + BLOCK > min(size, 40 * MOST_PIECES):
            raise Refused("the map of a sparse file is damaged")
        text += stream.take(BLOCK)
        if wanted == 1 and b"\n" in text:
            count = _decimal(text.partition(b"\n")[0])
            if count > MOST_PIECES:
                raise Refused(f"a sparse file has more than {MOST_PIECES} pieces")
            wanted = 1 + 2 * count
    return [_decimal(word) for word in text.split(b"\n")[1:wanted]], len(text)


def _decimal(word: bytes) -> int:
    if not word.isdigit() or len(word) > 20:
        raise Refused("the map of a sparse file is damaged")
    return int(word)
