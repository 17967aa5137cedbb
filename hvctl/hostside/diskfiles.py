"""Files and devices of the host that are to become a guest's disk: whether they may, and how large they are."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

_BLKGETSIZE64 = 0x80081272  # linux/fs.h
_QCOW2_MAGIC = b"QFI\xfb"
_FORMATS_OF_THEIR_OWN = (_QCOW2_MAGIC, b"KDMV", b"conectix", b"vhdxfile", b"\x7fVDI")


def find_fault_of_file(path: Path, store: Path) -> str:
    """Why a file may not be somebody's read-only disk; empty: it may. Links, and what is hvctl's own, may not."""
    fault = _find_fault_of_path(path)
    if fault or not path.exists():
        return fault or "it does not exist"
    if Path(os.path.realpath(path)) != path:
        return f"it is a symbolic link; that leads to {os.path.realpath(path)}"
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return "it is no regular file"
    if path.is_relative_to(store):
        return "it is in hvctl's own store"
    with path.open("rb") as stream:
        if stream.read(8).startswith(_FORMATS_OF_THEIR_OWN):
            return "it is a disk in a format of its own, not an ISO image"
    return ""


def find_fault_of_device(path: Path) -> str:
    """Why a path may not be somebody's disk; empty: it is a block device that nobody on this host uses.

    Links below /dev (by-id) are allowed: the host's root made them.
    """
    fault = _find_fault_of_path(path)
    if fault or not path.exists():
        return fault or "it does not exist"
    if not path.is_relative_to("/dev") or not Path(os.path.realpath(path)).is_relative_to("/dev"):
        return "it is not below /dev"
    if not stat.S_ISBLK(os.stat(path).st_mode):
        return "it is no block device"
    try:  # of a block device O_EXCL means: not mounted, no swap, no part of a RAID (open(2))
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "this host uses it itself (mounted, swap, or part of something)"
        return f"it cannot be opened: {error.strerror}"
    return ""


def resolve(path: str) -> str:
    """What a path leads to, links followed."""
    return os.path.realpath(path)


def size_of_device(path: Path) -> int:
    """Bytes of a block device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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
        raise OSError(errno.EINVAL, "not a qcow2 file", os.fspath(path))
    return int(struct.unpack(">Q", header[24:32])[0])


def _find_fault_of_path(path: Path) -> str:
    text = os.fspath(path)
    if not path.is_absolute() or os.path.normpath(text) != text:
        return "it is no absolute path"
    if any(sign in text for sign in ",=") or not text.isprintable():
        return "its path has a comma, an equals sign or a control character, which programs could take for options"
    return ""
