"""Files and devices that may become somebody's disk: what they are, and whether they may be used as one.

Raises OSError with the reason in words.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

_BLKGETSIZE64 = 0x80081272  # linux/fs.h
_QCOW2_MAGIC = b"QFI\xfb"
_MADE_FOR_QEMU = (_QCOW2_MAGIC, b"KDMV", b"conectix", b"vhdxfile", b"\x7fVDI")


def check_plain_file(path: Path, store: Path) -> None:
    """Return when this is a regular file by its own, whole name, of whoever but the store."""
    _check_path(path)
    facts = os.lstat(path)
    if stat.S_ISLNK(facts.st_mode) or Path(os.path.realpath(path)) != path:
        raise _refuse("a symbolic link: give the path that it leads to", path)
    if not stat.S_ISREG(facts.st_mode):
        raise _refuse("not a regular file", path)
    if path.is_relative_to(store):
        raise _refuse("in hvctl's own store", path)
    with path.open("rb") as stream:
        head = stream.read(8)
    if head.startswith(_MADE_FOR_QEMU):
        raise _refuse("a disk in a format of its own, not an ISO image", path)


def size_of(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size


def check_device(path: Path) -> int:
    """Bytes of a block device that nobody on this host uses. Links below /dev (by-id) are what the host's root made."""
    _check_path(path)
    real = Path(os.path.realpath(path))
    if not path.is_relative_to("/dev") or not real.is_relative_to("/dev"):
        raise _refuse("not below /dev", path)
    if not stat.S_ISBLK(os.stat(path).st_mode):
        raise _refuse("not a block device", path)
    try:  # of a block device O_EXCL means: not mounted, no swap, no part of a RAID (open(2))
        descriptor = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _refuse("in use on this host (mounted, swap, or part of something)", path) from error
        raise
    try:
        return int(struct.unpack("=Q", fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(8)))[0])
    finally:
        os.close(descriptor)


def may_read(path: Path, uid: int, gid: int) -> bool:
    """Whether another user may read a file, by asking the kernel as that user."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([gid])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def read_qcow2_size(path: Path) -> int:
    """The virtual size that the header of a qcow2 file of ours states (docs/interop/qcow2.txt, bytes 24 to 31)."""
    with path.open("rb") as stream:
        header = stream.read(32)
    if len(header) < 32 or not header.startswith(_QCOW2_MAGIC):
        raise _refuse("not a qcow2 file", path)
    return int(struct.unpack(">Q", header[24:32])[0])


def _check_path(path: Path) -> None:
    if not path.is_absolute():
        raise _refuse("not an absolute path", path)
    if any(sign in os.fspath(path) for sign in ",=") or not os.fspath(path).isprintable():
        raise _refuse("a path with a comma, an equals sign or a control character, which QEMU's options know", path)


def _refuse(reason: str, path: Path) -> OSError:
    return OSError(errno.EINVAL, reason, os.fspath(path))
