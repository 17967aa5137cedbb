"""Volumes of containers: a directory, or an ext4 file system in a file of ours, mounted with the container's owners.

A volume holds plain ids from 0 on, whoever wrote it, and is shown shifted to the ids of the container that has it: so
it can go from one to another. Nobody but root passes through its directory (0700), so that no other user reaches a
setuid program in it.

At a start libvirt's hook mounts it below the instance's directory, and libvirt takes it in from there. Into a container
that runs, a mount that is nowhere yet is moved by a process that has joined its mount namespace: no path of the
container's is ever followed outside of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from hvctl.hostside import files, groups, ids, loops, mounts
from hvctl.hostside.mounts import Extent

_UMOUNT_NOFOLLOW = 8
_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes space, tab, newline and backslash


class Volume:
    """One volume for one container.

    path: a directory, or a file with an ext4 file system; first_id: what is root inside, 0: nothing is shifted.
    """

    def __init__(self, path: Path, first_id: int, is_read_only: bool = False) -> None:
        self.path = path
        self.first_id = first_id
        self.is_read_only = is_read_only


def make_directory(folder: Path, content: Path) -> None:
    """An empty directory volume; fine when it is there."""
    files.make_directory(folder, 0o700)
    files.make_directory(content, 0o755)


def make_file(folder: Path, content: Path, size_bytes: int) -> None:
    """An empty file of this size without blocks; fine when it is there."""
    files.make_directory(folder, 0o711)  # the qemu user must pass
    descriptor = os.open(content, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def can_hold(folder: Path, size_bytes: int) -> bool:
    """Whether a file may be so large on the file system of a directory, whatever room there is; True where it cannot be tried."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return True
    try:
        os.ftruncate(descriptor, size_bytes)
    except OSError as error:
        return error.errno not in (errno.EFBIG, errno.EINVAL)
    finally:
        os.close(descriptor)
    return True


def undo_file(content: Path) -> Path:
    """What takes back the growth of a file system that has not ended, beside it (e2undo(8)); nobody may mount it then."""
    return content.with_name("growing.e2undo")


def mount(volume: Volume, target: Path) -> None:
    """Mount it, in the mount namespace of this process."""
    files.make_directory(target.parent, 0o711)
    files.make_directory(target, 0o711)
    with _open_tree(volume) as tree:
        mounts.move(tree, target)


def mount_inside(controller: int, volume: Volume, target: str) -> None:
    """Mount it in a container that runs, at a directory that is there. Raises OSError.

    Its root could make it writable again, so nothing read-only may be given in this way.
    """
    with _open_tree(volume) as tree:
        _in_mounts_of(groups.find_init(controller), lambda: mounts.move(tree, Path(target)))


def unmount_inside(controller: int, volume: Volume) -> None:
    """Take it away from a container that runs, also from services in it that have mount namespaces of their own.

    Fine when it has none. Raises OSError with EBUSY while it is used.
    """
    for process in _find_namespaces(groups.find_init(controller)):
        for point in reversed(list(_find_inside(process, volume))):
            path = os.fsencode(point)
            _in_mounts_of(process, lambda path=path: mounts.check(mounts.libc.umount2(path, _UMOUNT_NOFOLLOW), path))  # type: ignore[misc]


def is_inside(controller: int, volume: Volume) -> bool:
    """Whether a container that runs has it."""
    return any(_find_inside(groups.find_init(controller), volume))


@contextlib.contextmanager
def _open_tree(volume: Volume) -> Iterator[int]:
    """A mount of the volume that is nowhere yet."""
    with contextlib.ExitStack() as stack:
        owners = -1
        if volume.first_id:
            extents = (Extent(0, volume.first_id, ids.COUNT),)
            owners = stack.enter_context(mounts.open_owners(extents, extents))
        if volume.path.is_dir():
            tree = mounts.clone(volume.path, owners=owners, read_only=volume.is_read_only)
        else:
            if undo_file(volume.path).exists():
                raise OSError(
                    errno.EBUSY,
                    "its file system was just being made larger; finish that: hvctl gc",
                    os.fspath(volume.path),
                )
            loop, device = loops.open_loop(volume.path)
            stack.callback(os.close, loop)
            tree = mounts.open_ext4(device, owners=owners, read_only=volume.is_read_only)
        stack.callback(os.close, tree)
        yield tree


def _find_namespaces(init: int) -> list[int]:
    """One process for each mount namespace that a container's processes are in, its first process before all others."""
    found: dict[str, int] = {}
    inside = os.readlink(f"/proc/{init}/ns/pid")
    for name in (str(init), *filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.readlink(f"/proc/{name}/ns/pid") == inside:
                found.setdefault(os.readlink(f"/proc/{name}/ns/mnt"), int(name))
    return list(found.values())


def _find_inside(init: int, volume: Volume) -> Iterator[str]:
    """Where a process has it mounted (proc(5), mountinfo), oldest first."""
    is_directory = volume.path.is_dir()
    device = None if is_directory else loops.find_loop(volume.path)
    if not is_directory and device is None:
        return
    inside_its_file_system = "/" + os.fspath(Path(*volume.path.parts[-3:]))  # volumes/ID/data
    for line in groups.read_lines(f"/proc/{init}/mountinfo"):
        words = line.split(" ")
        source = words[words.index("-") + 2]
        if source == str(device) if device else words[3].endswith(inside_its_file_system):
            yield _OCTAL.sub(lambda octal: chr(int(octal[1], 8)), words[4])


def _in_mounts_of(process: int, deed: Callable[[], object]) -> None:
    """Do something in the mount namespace of a process. Raises the OSError that it raises there."""
    namespace = os.open(f"/proc/{process}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        number = 0
        try:
            mounts.check(mounts.libc.setns(namespace, mounts.CLONE_NEWNS), "mnt")
            deed()
        except OSError as error:
            number = error.errno or errno.EIO
        finally:
            os.write(tell, struct.pack("=I", number))
            os._exit(0)
    os.close(namespace)
    os.close(tell)
    with os.fdopen(told, "rb") as stream:
        answer = stream.read(4)
    os.waitpid(child, 0)
    number = struct.unpack("=I", answer)[0] if len(answer) == 4 else errno.EIO
    if number:
        raise OSError(number, os.strerror(number))
