"""Advisory locks that live as long as a process, or a program that it started, lives.

`flock(2)` on a file: the kernel lets go when the last descriptor is closed, so `kill -9` frees it and nothing stale
stays behind. Descriptors are handed to every program that `Shell.run` starts (`lending`), so a qemu-img that outlives
its parent still counts as "busy".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from _thread import allocate_lock, get_ident
from collections.abc import Iterator
from pathlib import Path

_held: dict[int, int] = {}  # descriptor -> the thread that holds it
_changing = allocate_lock()  # `threading` costs each start of a guest to import
_LONGEST_PAUSE_S = 0.008


@contextlib.contextmanager
def lending() -> Iterator[tuple[int, ...]]:
    """Descriptors of all locks that this process holds now, good for the block: another thread may let go meanwhile."""
    with _changing:
        copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3) for descriptor in _held]
    try:
        yield tuple(copies)
    finally:
        for copy in copies:
            os.close(copy)


@contextlib.contextmanager
def hold(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Hold the lock at `path` for the block; the file is removed again at the end.

    Raises BlockingIOError when another process still holds it after `timeout_s` (0 tries once), OSError when the file
    cannot be opened.
    """
    descriptor = _take(path, time.monotonic() + timeout_s)
    with _changing:
        _held[descriptor] = get_ident()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        with _changing:
            del _held[descriptor]
            os.close(descriptor)


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock at `path` at this moment."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def is_mine(path: Path) -> bool:
    """Whether this thread holds the lock at `path`."""
    with _changing:
        mine = [descriptor for descriptor, thread in _held.items() if thread == get_ident()]
    with contextlib.suppress(FileNotFoundError):
        facts = os.stat(path, follow_symlinks=False)
        return any(os.path.samestat(facts, os.fstat(descriptor)) for descriptor in mine)
    return False


def _take(path: Path, deadline_s: float) -> int:
    """An open descriptor that holds the lock on the file that `path` names now.

    The holder before us unlinks the file when it is done; whoever waited on that inode must start over, or two
    processes would each hold "the" lock on different inodes.
    """
    pause_s = 0.002
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline_s:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", os.fspath(path)) from None
            # flock(2) has no timeout and a signal would need the main thread. Who waits long must not look more seldom
            # than those who come later, or starves among many (seen: 30 s, of 100 creates on a slow host).
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            continue
        if _is_current(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    mine = os.fstat(descriptor)
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
