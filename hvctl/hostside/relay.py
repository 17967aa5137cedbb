"""Entries of an archive, read and checked by one process, put into the tree by another: each has a processor of its own."""

from __future__ import annotations

import fcntl
import marshal
import os
from collections.abc import Callable, Iterator

from hvctl.hostside import refusal
from hvctl.hostside.bytestream import copy_part
from hvctl.hostside.tarstream import Entry, Kind

# Sent together; an entry that may be of some MiB, before the next one comes.
_AT_ONCE, _LONG_BYTES = 64, 4096
_PIPE_BYTES = 1024**2
_F_SETPIPE_SZ = 1031
_KINDS = tuple(Kind)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}


class Place:
    """Where an entry's content is in the archive's file; to a `Tree`, as good as a stream that stands there."""

    def __init__(self, descriptor: int, at: int) -> None:
        self.descriptor = descriptor
        self._at = at

    def skip(self, count: int) -> int:
        """Leave so many bytes to `copy_part`: where they are."""
        at, self._at = self._at, self._at + count
        return at

    def copy(self, count: int, descriptor: int | None) -> None:
        """Write so many bytes to a descriptor, or nowhere. Raises Refused at the end."""
        at = self.skip(count)
        if descriptor is not None:
            copy_part(self.descriptor, at, count, descriptor)


class Relay:
    """The way to a process, forked from this one, that puts entries into a tree."""

    def __init__(self, archive: int, put_all: Callable[[Iterator[tuple[Entry, Place]]], None]) -> None:
        """`archive`: its file. `put_all` runs in the other process; what it raises ends both, by `refusal.give_up`."""
        out, self._into = os.pipe()
        self._waiting: list[tuple[object, ...]] = []
        self._process = os.fork()
        if self._process == 0:
            try:
                os.close(self._into)
                put_all(_receive(out, archive))
                os._exit(0)
            except EOFError:  # the first process has ended, and said why
                os._exit(refusal.FAILED)
            except BaseException as error:  # noqa: BLE001  a forked process must end here
                refusal.give_up(type(error), error, None)
        os.close(out)
        fcntl.fcntl(self._into, _F_SETPIPE_SZ, _PIPE_BYTES)

    def send(self, entry: Entry, at: int) -> None:
        """Have one more put in, whose content is at this place of the archive."""
        name, kind, *rest = entry
        self._waiting.append((at, name, _NUMBERS[kind], *rest))
        if len(self._waiting) >= _AT_ONCE or entry.attributes or len(name) + len(entry.link) > _LONG_BYTES:
            self._flush()

    def finish(self) -> None:
        """Wait until everything is in. Ends this process with the other's status where that has failed."""
        try:
            self._flush()
            self._write([])
        except BrokenPipeError:
            pass  # it has ended, and said why
        os.close(self._into)
        status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        if status:
            os._exit(status if status > 0 else 128 - status)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._write(waiting)

    def _write(self, batch: list[tuple[object, ...]]) -> None:
        data = marshal.dumps(batch)
        data = len(data).to_bytes(4, "little") + data
        while data:
            data = data[os.write(self._into, data) :]


def _receive(descriptor: int, archive: int) -> Iterator[tuple[Entry, Place]]:
    """What the other process sends. Raises EOFError when that is gone before it has sent all."""
    with os.fdopen(descriptor, "rb") as stream:
        while True:
            length = stream.read(4)
            if len(length) < 4:
                raise EOFError("the process that reads the archive is gone")
            batch = marshal.loads(stream.read(int.from_bytes(length, "little")))
            if not batch:
                return
            for at, name, number, *rest in batch:
                yield Entry(name, _KINDS[number], *rest), Place(archive, at)
