"""Passing on what comes out of descriptors while a process runs, and what goes into one.

poll(2), for select(2) knows no descriptor above 1023. Nothing blocks but the writing to whoever looks at it: a command
that prints while it is being written to must never wait for us while we wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO

_PIECE_BYTES = 64 * 1024
_LEFT_BYTES = 1024 * 1024
"""So much is still read when the process has ended: what it leaves running may go on writing for ever."""


class Feed:
    """What goes into `sink`: first `waiting`, then what the descriptor `keys` gives. Then it is closed.

    With an `end`, which is how a terminal is told, that goes into it instead.
    """

    def __init__(self, sink: IO[bytes], *, waiting: bytes = b"", keys: int = -1, end: bytes = b"") -> None:
        os.set_blocking(sink.fileno(), False)
        self.sink = sink
        self._waiting = waiting
        self._keys = keys
        self._end = end
        self._is_closed_at_end = not end
        self._close_if_done()

    def interests(self) -> Iterator[tuple[int, int]]:
        """Descriptors, and what of them is waited for (poll(2))."""
        if self._waiting:
            yield self.sink.fileno(), select.POLLOUT
        elif self._keys >= 0:
            yield self._keys, select.POLLIN

    def go_on(self, ready: Mapping[int, int]) -> None:
        """Do what can be done, given the descriptors that are ready."""
        try:
            if self._waiting and self.sink.fileno() in ready:
                self._waiting = self._waiting[self.sink.write(self._waiting) or 0 :]
            elif not self._waiting and self._keys in ready and (data := _read(self._keys)) is not None:
                self._waiting = data or self._end
                self._keys = self._keys if data else -1
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # nobody reads it any more
                raise
            self._waiting, self._keys = b"", -1
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_closed_at_end and not self._waiting and self._keys < 0:
            self.sink.close()


def relay(
    process: int,
    outputs: Mapping[IO[bytes], Callable[[bytes], object]],
    feed: Feed | None = None,
    *,
    until_s: float | None = None,
) -> None:
    """Pass on what comes out of `outputs`, and feed, until a child process has ended; it is left to be waited for.

    Ends as well when a terminal that is fed has been closed on its other side. `until_s`: on the monotonic clock.
    Raises TimeoutError, and what the functions raise.
    """
    running = dict(outputs)
    for source in running:
        os.set_blocking(source.fileno(), False)
    handle = os.pidfd_open(process)
    try:
        while True:
            ready = _poll([(handle, select.POLLIN), *_interests(running, feed)], until_s)
            if feed is not None:
                feed.go_on(ready)
            has_ended = handle in ready
            for source in [source for source in running if has_ended or source.fileno() in ready]:
                if not _pass_on(source.fileno(), running[source], all_of_it=has_ended):
                    del running[source]
            if has_ended or (feed is not None and feed.sink in outputs and feed.sink not in running):
                return
    finally:
        os.close(handle)


def read(source: IO[bytes], take: Callable[[bytes], object], *, until_s: float | None = None) -> None:
    """Pass on what comes until its end. Raises TimeoutError."""
    os.set_blocking(source.fileno(), False)
    is_open = True
    while is_open:
        _poll([(source.fileno(), select.POLLIN)], until_s)
        is_open = _pass_on(source.fileno(), take, all_of_it=False)


def write_all(descriptor: int) -> Callable[[bytes], None]:
    """A function that writes all that it is given to a descriptor, also to one that somebody has made non-blocking."""

    def write(data: bytes) -> None:
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:
                _poll([(descriptor, select.POLLOUT)], None)

    return write


def _interests(running: Mapping[IO[bytes], object], feed: Feed | None) -> Iterator[tuple[int, int]]:
    yield from ((source.fileno(), select.POLLIN) for source in running)
    if feed is not None and not feed.sink.closed:
        yield from feed.interests()


def _poll(interests: list[tuple[int, int]], until_s: float | None) -> dict[int, int]:
    wanted: dict[int, int] = {}
    for descriptor, events in interests:
        wanted[descriptor] = wanted.get(descriptor, 0) | events
    waiting = select.poll()
    for descriptor, events in wanted.items():
        waiting.register(descriptor, events)
    ready = waiting.poll(None if until_s is None else max(0.0, until_s - time.monotonic()) * 1000)
    if not ready:
        raise TimeoutError(errno.ETIMEDOUT, "there was no end of it in time")
    return dict(ready)


def _pass_on(source: int, take: Callable[[bytes], object], *, all_of_it: bool) -> bool:
    """Whether more may come."""
    passed = 0
    while True:
        data = _read(source)
        if data is None:
            return True
        if not data:
            return False
        take(data)
        passed += len(data)
        if not all_of_it or passed >= _LEFT_BYTES:
            return True


def _read(descriptor: int) -> bytes | None:
    """A piece; empty at its end, also of a terminal's that nobody holds any more; None when there is nothing yet."""
    with contextlib.suppress(BlockingIOError):
        try:
            return os.read(descriptor, _PIECE_BYTES)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""
    return None
