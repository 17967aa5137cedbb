"""What a file system can do, tried: each function works in a private directory that the caller made and removes.

An empty answer says that it works; anything else is the reason why not. Mounts are made by a thread in a mount
namespace of its own, which ends with the thread: nothing can stay mounted, whatever happens.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

from hvctl.hostside import files, mounts

_FICLONE = 0x40049409  # ioctl_ficlone(2)
_SHIFTED_UID = 100_000


def try_overlay(directory: Path) -> str:
    """Overlayfs with its upper directory here: copy up, delete a file of the lower one, rename a directory."""
    lower, upper, work, merged = (directory / name for name in ("lower", "upper", "work", "merged"))

    def attempt() -> None:
        for path in (lower, upper, work, merged):
            path.mkdir()
        for name in ("changed", "deleted"):
            (lower / name).write_text("lower")
        mounts.overlay([str(lower)], str(upper), str(work), str(merged))
        (merged / "changed").write_text("upper")
        (merged / "deleted").unlink()
        (merged / "old").mkdir()
        (merged / "old").rename(merged / "new")
        if (upper / "changed").read_text() != "upper" or sorted(os.listdir(merged)) != ["changed", "new"]:
            raise OSError(errno.EIO, "what was written is not in the upper directory", os.fspath(upper))

    return _reason(lambda: _in_own_mounts(attempt))


def try_idmapped(directory: Path) -> str:
    """A mount of this directory whose owners are shifted (mount_setattr(2), Linux 5.12 and the file system's support)."""

    def attempt() -> None:
        (directory / "owned").write_text("")
        owner = (directory / "owned").stat().st_uid
        shifted = (mounts.Extent(owner, _SHIFTED_UID, 1),)
        with mounts.open_owners(shifted, shifted) as owners:
            tree = mounts.clone(directory, owners=owners)
            try:
                seen = os.stat("owned", dir_fd=tree).st_uid
            finally:
                os.close(tree)
        if seen != _SHIFTED_UID:
            raise OSError(errno.EIO, f"a file of uid {owner} is shown as {seen}, not {_SHIFTED_UID}")

    return _reason(attempt)


def try_attributes(directory: Path) -> str:
    """Extended attributes of both kinds that overlay layers and images of containers need (xattr(7))."""

    def attempt() -> None:
        for name in ("user.hvctl", "trusted.hvctl") if os.geteuid() == 0 else ("user.hvctl",):
            os.setxattr(directory, name, b"kept")
            if os.getxattr(directory, name) != b"kept":
                raise OSError(errno.EIO, f"{name} was not kept")

    return _reason(attempt)


def try_reflink(directory: Path) -> str:
    """A copy that shares its blocks (FICLONE)."""

    def attempt() -> None:
        (directory / "source").write_bytes(b"x" * 65536)
        with (directory / "source").open("rb") as source, (directory / "copy").open("xb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, source.fileno())

    return _reason(attempt)


def try_publishing(directory: Path) -> str:
    """What publishing rests on: renameat2(NOREPLACE) that refuses a taken name, and fsync of files and directories."""

    def attempt() -> None:
        (directory / "taken").mkdir()
        (directory / "aside").mkdir()
        (directory / "aside" / "file").write_text("content")
        try:
            files.publish(directory / "aside", directory / "taken")
        except FileExistsError:
            files.publish(directory / "aside", directory / "final")
            return
        raise OSError(errno.EIO, "a taken name was given away")

    return _reason(attempt)


def try_unnamed_files(directory: Path) -> str:
    """A file that has no name until it is complete (O_TMPFILE, then linkat)."""

    def attempt() -> None:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        table = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:  # with a directory descriptor Python calls linkat(2), which alone can follow the link in /proc
            os.link(str(descriptor), directory / "named", src_dir_fd=table, follow_symlinks=True)
        finally:
            os.close(table)
            os.close(descriptor)

    return _reason(attempt)


def _reason(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _in_own_mounts(work: Callable[[], None]) -> None:
    """Do the work in a thread with its own mount namespace; what it raises is raised here."""
    failures: list[OSError] = []

    def run() -> None:
        try:
            mounts.check(mounts.libc.unshare(mounts.CLONE_NEWNS), "/")
            mounts.check(mounts.libc.mount(None, b"/", None, mounts.MS_REC | mounts.MS_PRIVATE, None), "/")
            work()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="own-mounts")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
