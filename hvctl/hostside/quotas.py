"""Limits on what a container may write to its root: project quotas, which ext4 and XFS have (quotactl(2)).

Each writable layer is a project of its own: its directories carry the project's number, and whatever is made in them
inherits it. So only the top of a root is counted, and only for whoever writes to it: what it stands on (the image,
snapshots, layers that copies share) is nobody's. `df` inside shows the limit, since an overlay asks its upper directory.

A container cannot get out of its project: only the first user namespace may change one (fs/ioctl.c,
fileattr_set_prepare). Nor does an overlay pass on the privilege of who mounted it to exceed a quota (fs/overlayfs/super.c).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_SYS_QUOTACTL_FD = 443  # Linux 5.14; the same on every architecture
_PROJECTS = 2  # PRJQUOTA of linux/quota.h
_GET, _SET, _GET_STATE = 0x800007, 0x800008, 0x5805  # Q_GETQUOTA, Q_SETQUOTA, Q_XGETQSTAT
_IS_ENFORCED = 1 << 5  # FS_QUOTA_PDQ_ENFD of linux/dqblk_xfs.h
_STATE = struct.Struct("=2xH1020x")  # struct fs_quota_stat: its flags, and room for the rest
_QUOTA = struct.Struct("=8QI4x")  # struct if_dqblk: hard limit in KiB, soft limit, bytes used, ...; what of it is set
_BLOCK_LIMITS = 1  # QIF_BLIMITS
_KIB = 1024
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820  # FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
_ATTRIBUTES = struct.Struct("=5I8s")  # struct fsxattr: flags, two numbers, project, ...
_INHERITS = 0x200  # FS_XFLAG_PROJINHERIT
_FIRST = 0x40000000  # far from the numbers that people write into /etc/projid
_NO_PROJECTS = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL)
_NO_QUOTAS = (errno.ENOSYS, errno.ESRCH, errno.ENOENT, errno.EINVAL)
_libc = ctypes.CDLL(None, use_errno=True)


def is_enforced(path: Path) -> bool:
    """Whether the file system of a directory holds projects to their limits."""
    with _open(path) as directory:
        state = _call(directory, _GET_STATE, 0, bytes(_STATE.size))
    return state is not None and bool(_STATE.unpack(state)[0] & _IS_ENFORCED)


def mark(layer: Path) -> None:
    """Make a project of a layer in which nothing is yet; nothing happens where its file system knows none."""
    try:
        with _open(layer / "upper") as upper, _open(layer / "work") as work:
            project = _find_project(upper) or _choose(layer)
            for directory in (upper, work):
                flags, *numbers, _project, last, rest = _read(directory)
                attributes = _ATTRIBUTES.pack(flags | _INHERITS, *numbers, project, last, rest)
                fcntl.ioctl(directory, _SET_ATTRIBUTES, attributes)
    except OSError as error:
        if error.errno not in _NO_PROJECTS:
            raise


def is_counted(layer: Path) -> bool:
    """Whether a layer can be limited: it is a project, and its file system holds those to their limits."""
    return find_project(layer) != 0 and is_enforced(layer)


def find_project(layer: Path) -> int:
    """The number of the project that a layer is; 0: none."""
    with _open(layer / "upper") as upper:
        return _find_project(upper)


def measure(layer: Path) -> int:
    """Bytes that a layer which is counted takes."""
    return _read_quota(layer, find_project(layer))[2]


def limit(layer: Path, size_bytes: int) -> None:
    """Let a layer take this much and no more (0: any amount), from now on; nothing happens where it is not counted."""
    project, size_kib = find_project(layer), -(-size_bytes // _KIB)
    if project and is_enforced(layer) and get_limit(layer, project) != size_kib * _KIB:
        with _open(layer) as directory:
            _call(directory, _SET, project, _QUOTA.pack(size_kib, *(0,) * 7, _BLOCK_LIMITS))


def get_limit(path: Path, project: int) -> int:
    """Bytes that a project may take on the file system of a directory; 0: any amount."""
    return _read_quota(path, project)[0] * _KIB


def _choose(layer: Path) -> int:
    """The number of a project that nothing belongs to."""
    while True:
        project = _FIRST | int.from_bytes(os.urandom(4), "little") & (_FIRST - 1)
        if not any(_read_quota(layer, project)):
            return project


def _read_quota(path: Path, project: int) -> tuple[int, ...]:
    """Hard limit in KiB, soft limit, bytes used, and the same of inodes; zeros where none of that is kept."""
    with _open(path) as directory:
        quota = _call(directory, _GET, project, bytes(_QUOTA.size)) or bytes(_QUOTA.size)
    return _QUOTA.unpack(quota)[:6]


def _find_project(directory: int) -> int:
    """The project whose number new files in a directory get; 0: none."""
    try:
        flags, _extent_size, _extents, project, *_rest = _read(directory)
    except OSError as error:
        if error.errno not in _NO_PROJECTS:
            raise
        return 0
    return int(project) if flags & _INHERITS else 0


def _read(directory: int) -> tuple[int, ...]:
    """What ioctl_xfs_fsgetxattr(2) says of a directory: flags, two numbers, project, another number, the rest."""
    return _ATTRIBUTES.unpack(fcntl.ioctl(directory, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size)))


def _call(directory: int, command: int, project: int, content: bytes) -> bytes | None:
    """What quotactl_fd(2) makes of a structure; None where there are no quotas, or no such project."""
    buffer = ctypes.create_string_buffer(content, len(content))
    which = ctypes.c_uint(command << 8 | _PROJECTS)
    if _libc.syscall(_SYS_QUOTACTL_FD, directory, which, ctypes.c_uint(project), buffer) == 0:
        return buffer.raw
    number = ctypes.get_errno()
    if number not in _NO_QUOTAS:
        raise OSError(number, os.strerror(number))
    return None


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
