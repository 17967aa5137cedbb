"""Known files inside a foreign tree, looked up by openat2(2) so that no link leads out of it (Linux 5.6)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_TRIES = 100
_libc = ctypes.CDLL(None, use_errno=True)


def read(tree: Path, name: str, limit_bytes: int) -> tuple[bytes | None, str]:
    """The content of a regular file, and why not. None without a reason: there is none. Never waits, for a FIFO say."""
    root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # First without opening it: to open a device can do something.
        found = _open_in_root(root, name.lstrip("/"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None, ""
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return None, os.strerror(error.errno)
        raise
    finally:
        os.close(root)
    try:
        facts = os.fstat(found)
        if not stat.S_ISREG(facts.st_mode):
            return None, "it is no regular file"
        descriptor = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    finally:
        os.close(found)
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        return None, f"it is longer than {limit_bytes} bytes"
    return content, ""


def find(tree: Path, names: Sequence[str]) -> str:
    """The first of these names that is something in the tree; empty: none is."""
    root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            with contextlib.suppress(OSError):
                os.close(_open_in_root(root, name.lstrip("/")))
                return name
    finally:
        os.close(root)
    return ""


def list_names(tree: Path, name: str) -> list[str]:
    """The names in a directory of the tree, sorted; empty when it is not there."""
    root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _open_in_root(root, name.lstrip("/"))
    except OSError:
        return []
    finally:
        os.close(root)
    try:
        return sorted(os.listdir(f"/proc/self/fd/{found}"))
    except NotADirectoryError:
        return []
    finally:
        os.close(found)


def _open_in_root(root: int, name: str) -> int:
    how = (ctypes.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    for _try in range(_TRIES):
        found = _libc.syscall(_SYS_OPENAT2, root, os.fsencode(name), ctypes.byref(how), ctypes.sizeof(how))
        if found >= 0:
            return int(found)
        number = ctypes.get_errno()
        if number != errno.EAGAIN:  # something was renamed meanwhile (openat2(2))
            break
    raise OSError(number, os.strerror(number), name)
