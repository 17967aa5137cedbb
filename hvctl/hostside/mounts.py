"""Mounts that a command line cannot make: with shifted owners (mount_setattr(2), Linux 5.12), and overlays.

util-linux has `X-mount.idmap` only since 2.39. Numbers of system calls are the same on every architecture.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_NODEV, MS_REC, MS_PRIVATE = 0x4, 0x4000, 1 << 18
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 1, 1, 6
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_ATTR_RDONLY, _ATTR_NODEV, _ATTR_IDMAP = 0x1, 0x4, 0x00100000
libc = ctypes.CDLL(None, use_errno=True)


class Extent:
    """A run of ids: `count` owners on the disk from `stored` on are shown as those from `shown` on (user_namespaces(7))."""

    def __init__(self, stored: int, shown: int, count: int) -> None:
        self.stored = stored
        self.shown = shown
        self.count = count


class _Attributes(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def check(result: int, path: Path | str) -> int:
    """The result of a call of libc's, or the OSError that it means."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(path))
    return result


def bind(source: Path, target: Path, *, owners: int = -1, read_only: bool = False) -> None:
    """Show `source` at `target`, no devices in it; with `owners` (`open_owners`) as others' files.

    Raises OSError with EINVAL where the file system of `source` cannot be shifted.
    """
    tree = clone(source, owners=owners, read_only=read_only)
    try:
        move(tree, target)
    finally:
        os.close(tree)


def move(tree: int, target: Path) -> None:
    """Put a mount that is nowhere yet (`clone`, `open_ext4`) at `target`."""
    moved = libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    check(moved, target)


def clone(source: Path, *, owners: int = -1, read_only: bool = False) -> int:
    """A descriptor of a mount of `source` that is nowhere yet."""
    tree = check(
        libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC), source
    )
    return _set_attributes(tree, source, owners=owners, read_only=read_only)


def open_ext4(device: Path, *, owners: int = -1, read_only: bool = False) -> int:
    """A descriptor of the ext4 file system on a block device, mounted nowhere yet; a second one is of the same mount.

    Whatever the file system says of itself, an error in it makes it read-only and never stops this host.
    """
    context = check(libc.syscall(_SYS_FSOPEN, b"ext4", _FSOPEN_CLOEXEC), device)
    try:
        for key, value in ((b"source", os.fsencode(device)), (b"errors", b"remount-ro")):
            check(libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key, value, 0), device)
        check(libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), device)
        tree = check(libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, _ATTR_NODEV), device)
    finally:
        os.close(context)
    return _set_attributes(tree, device, owners=owners, read_only=read_only)


def open_memory() -> int:
    """A descriptor of an empty file system in memory, for root alone and mounted nowhere: it is gone with the descriptor."""
    context = check(libc.syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC), "tmpfs")
    try:
        check(libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, b"mode", b"0700", 0), "tmpfs")
        check(libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "tmpfs")
        return check(libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, _ATTR_NODEV), "tmpfs")
    finally:
        os.close(context)


def _set_attributes(tree: int, source: Path, *, owners: int, read_only: bool) -> int:
    """The same descriptor; closed when it cannot be."""
    try:
        attributes = _Attributes(attr_set=_ATTR_NODEV | (_ATTR_RDONLY if read_only else 0))
        if owners >= 0:
            attributes.attr_set |= _ATTR_IDMAP
            attributes.userns_fd = owners
        size = ctypes.sizeof(attributes)
        done = libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size)
        check(done, source)
    except OSError:
        os.close(tree)
        raise
    return tree


def overlay(lowers: Sequence[str], upper: str, work: str, target: str) -> None:
    """Mount an overlay, no devices in it; the topmost lower first. Short relative paths: mount(2) takes 4 KB of options."""
    # Said, since a kernel may have others as its default: layers are copied, merged and stacked as plain directories.
    ours = "redirect_dir=off,index=off,metacopy=off"
    options = f"{ours},lowerdir={':'.join(lowers)},upperdir={upper},workdir={work}"
    if len(options) > 4000:
        raise OSError(errno.E2BIG, f"{len(lowers)} layers are more than mount(2) takes", target)
    check(libc.mount(b"overlay", os.fsencode(target), b"overlay", MS_NODEV, options.encode()), target)


def unmount(target: Path) -> None:
    """Take every mount away that is at `target`; fine when there is none. Whoever uses one keeps it until he is done."""
    while libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        pass
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        check(-1, target)


@contextlib.contextmanager
def open_owners(uids: Sequence[Extent], gids: Sequence[Extent]) -> Iterator[int]:
    """A descriptor of a user namespace that says how owners are shifted. Raises OSError where none can be made."""
    ready, ready_end = os.pipe()
    held, held_end = os.pipe()
    # A thread cannot make one (unshare(2)); a forked process has one thread, and lives until the descriptor is there.
    child = os.fork()
    if child == 0:
        os.close(held_end)
        os.write(ready_end, b"+" if libc.unshare(CLONE_NEWUSER) == 0 else b"-")
        os.read(held, 1)
        os._exit(0)
    try:
        os.close(held)
        if os.read(ready, 1) != b"+":
            raise OSError(errno.EPERM, "no user namespace can be made")
        for kind, extents in (("uid_map", uids), ("gid_map", gids)):
            lines = "".join(f"{extent.stored} {extent.shown} {extent.count}\n" for extent in extents)
            Path(f"/proc/{child}/{kind}").write_text(lines)
        descriptor = os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for end in (ready, ready_end, held_end):
            os.close(end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
