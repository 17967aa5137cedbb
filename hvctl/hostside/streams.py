"""The host's ends of an application's stdin, stdout and stderr, and the copying between them and a caller's own.

A container's are FIFOs in a directory that it cannot change, a VM's are sockets on which QEMU listens. Either way the
process waits while nobody takes its output, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path

from hvctl.values import dataclass

NAMES = ("stdin", "stdout", "stderr")
_CHUNK_BYTES = 65536
_LOOK_S = 0.05
_CONNECT_TIMEOUT_S = 5.0


@dataclass
class Streams:
    """Open ends. `stdin` may come later: a FIFO cannot be opened before the other end is."""

    stdout: int
    stderr: int
    stdin: int = -1
    fifo: Path | None = None
    """Of stdin, while it is not open."""
    _waiting: bytes = field(default=b"", repr=False)
    _spent: int = -1
    """A socket of stdin that nothing more goes into."""

    def close(self) -> None:
        """Close all that is open."""
        for descriptor in {self.stdin, self.stdout, self.stderr, self._spent} - {-1}:
            os.close(descriptor)
        self.stdin = self.stdout = self.stderr = self._spent = -1
        self.fifo = None

    def copy(self, ours: Sequence[int], look: Callable[[], bool]) -> None:
        """Copy until stdout and stderr have ended, between them and these three descriptors of ours.

        `look` is called every 50 ms or so, and says whether the process may still have something to say. Raises
        BrokenPipeError when nobody takes our output any more.
        """
        outputs = {self.stdout: ours[1], self.stderr: ours[2]}
        source, looked_s = ours[0], time.monotonic()
        while outputs:
            if self.stdin < 0 and self.fifo is not None:
                self._open_input()
            wants_input = self.stdin >= 0 and source >= 0 and not self._waiting
            readers = [*outputs, *([source] if wants_input else [])]
            ready, writable, _ = select.select(readers, [self.stdin] if self._waiting else [], [], _LOOK_S)
            if source in ready and source not in outputs and not self._take_input(source):
                source = -1
            if writable:
                self._give_input()
            ended = [end for end in ready if end in outputs and not _pass_on(end, outputs[end])]
            for end in ended:
                del outputs[end]
            if time.monotonic() - looked_s >= _LOOK_S:
                looked_s = time.monotonic()
                if not look() and not ready:
                    return

    def _open_input(self) -> None:
        assert self.fifo is not None
        try:
            self.stdin = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads yet
                raise
        else:
            self.fifo = None

    def _take_input(self, source: int) -> bool:
        """Read from our stdin; False at its end."""
        try:
            self._waiting = os.read(source, _CHUNK_BYTES)
        except OSError:  # closed, or a terminal's that another job has
            self._waiting = b""
        if not self._waiting:
            self._end_input()
        return bool(self._waiting)

    def _give_input(self) -> None:
        try:
            self._waiting = self._waiting[os.write(self.stdin, self._waiting) :]
        except BlockingIOError:
            return
        except OSError:  # the process reads no more
            self._waiting = b""
            self._end_input()

    def _end_input(self) -> None:
        if stat.S_ISSOCK(os.fstat(self.stdin).st_mode):
            # Half of it: QEMU forgets what it has not delivered when a socket is closed (7.2, tcp_chr_hup).
            with socket.socket(fileno=os.dup(self.stdin)) as end, contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR)
            self._spent, self.stdin = self.stdin, -1
        else:
            os.close(self.stdin)
            self.stdin = -1


def make_fifos(directory: Path, uid: int, gid: int) -> None:
    """Make the three FIFOs in a directory, for this user; fine when they are there."""
    for name in NAMES:
        path = directory / name
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        os.chown(path, uid, gid, follow_symlinks=False)


def open_fifos(directory: Path) -> Streams:
    """The host's ends of FIFOs; the process's init waits until they are there."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    stdout, stderr = (os.open(directory / name, flags) for name in ("stdout", "stderr"))
    return Streams(stdout=stdout, stderr=stderr, fifo=directory / "stdin")


def connect(directory: Path) -> Streams:
    """The host's ends of a VM's ports, which are sockets `NAME` in this directory. Raises OSError."""
    opened: list[int] = []
    try:
        for name in NAMES:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
                end.settimeout(_CONNECT_TIMEOUT_S)
                end.connect(os.fspath(directory / name))
                end.setblocking(False)
                opened.append(end.detach())
        os.write(opened[0], b"+")  # the init in there waits for it: an empty port looks like one that is not there yet
    except OSError:
        for descriptor in opened:
            os.close(descriptor)
        raise
    return Streams(stdin=opened[0], stdout=opened[1], stderr=opened[2])


def _pass_on(source: int, target: int) -> bool:
    """Copy what is there; False at the end. All of it is written before anything else is read."""
    try:
        data = os.read(source, _CHUNK_BYTES)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    if not data:
        return False
    while data:
        try:
            data = data[os.write(target, data) :]
        except BlockingIOError:  # a terminal that somebody else made so
            select.select([], [target], [], _LOOK_S)
    return True
