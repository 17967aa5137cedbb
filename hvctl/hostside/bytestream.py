"""Bytes from a descriptor, in order: taken, copied, counted and hashed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hvctl.hostside.refusal import Refused

_CHUNK_BYTES = 1024**2


class Stream:
    """Bytes from a descriptor in order, counted as they come, and hashed where somebody wants to know.

    Two buffers: a thread hashes one (hashlib lets others run meanwhile) while the other is filled.
    """

    def __init__(self, descriptor: int, tell: Callable[[int], None], *, has_digest: bool = False) -> None:
        """`descriptor` stands at its beginning. `tell` gets the number of bytes so far after each chunk, and may raise."""
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.descriptor = descriptor
        self._full, self._spare = (memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2))
        self._at = self._end = 0
        self._tell = tell
        self._digest = hashlib.sha256() if has_digest else None
        self._hasher = ThreadPoolExecutor(1) if has_digest else None
        self._hashing: Future[None] | None = None
        self.total_bytes = 0
        self.is_at_end = False
        facts = os.fstat(descriptor)
        self._size = facts.st_size if stat.S_ISREG(facts.st_mode) and not has_digest else 0
        """0 where others cannot read parts of it, or must not: all is to be hashed."""

    def take(self, count: int) -> bytes:
        """Exactly so many bytes (few). Raises Refused at the end."""
        found = self.take_some(count)
        if len(found) != count:
            raise Refused("it is cut short")
        return found

    def take_some(self, count: int) -> bytes:
        """So many bytes (few), fewer at the end."""
        at, after = self._at, self._at + count
        if after <= self._end:
            self._at = after
            return bytes(self._full[at:after])
        parts = []
        while count and (self._at < self._end or self._fill()):
            parts.append(bytes(self._next(count)))
            count -= len(parts[-1])
        return b"".join(parts)

    def copy(self, count: int, descriptor: int | None) -> None:
        """Write so many bytes to a descriptor, or nowhere. Raises Refused at the end."""
        while count:
            if self._at == self._end and not self._fill():
                raise Refused("it is cut short")
            part = self._next(count)
            count -= len(part)
            while descriptor is not None and part:
                part = part[os.write(descriptor, part) :]

    def skip(self, count: int) -> int | None:
        """Leave so many bytes to `copy_part`: where in the file they are. None, and nothing is done, where that cannot be."""
        at = self.total_bytes - (self._end - self._at)
        if at + count > self._size:  # or it is cut short: who copies it says so
            return None
        rest = count - len(self._next(count))
        if rest:
            os.lseek(self.descriptor, rest, os.SEEK_CUR)
            self.total_bytes += rest
            self._tell(self.total_bytes)
        return at

    def finish(self) -> str:
        """Read to the end; the SHA-256 of everything, in hex, or nothing where nobody wanted it."""
        while self._fill():
            pass
        self._wait()
        return self._digest.hexdigest() if self._digest else ""

    def _next(self, count: int) -> memoryview:
        at, self._at = self._at, min(self._at + count, self._end)
        return self._full[at : self._at]

    def _fill(self) -> bool:
        self._full, self._spare = self._spare, self._full
        size = self._file.readinto(self._full) or 0
        self._wait()
        self._at, self._end = 0, size
        if self._hasher and self._digest:
            self._hashing = self._hasher.submit(self._digest.update, self._full[:size])
        self.total_bytes += size
        self.is_at_end = not size
        self._tell(self.total_bytes)
        return bool(size)

    def _wait(self) -> None:
        if self._hashing:
            self._hashing.result()


def copy_part(source: int, at: int, count: int, descriptor: int) -> None:
    """Write a part of a file to another. Raises Refused when it ends before."""
    while count:
        copied = os.sendfile(descriptor, source, at, count)
        if not copied:
            raise Refused("it is cut short")
        at, count = at + copied, count - copied
