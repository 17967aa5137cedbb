"""Files and directories that appear whole or not at all: written aside, synced, published by rename.

`rename(2)` is atomic on one file system; `RENAME_NOREPLACE` (renameat2(2), Linux 3.15) makes it refuse an existing
target, so two processes cannot publish over each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

TYPE_CHECKING = False  # not typing's, as in the hook
if TYPE_CHECKING:
    import subprocess

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_FICLONE = 0x40049409  # ioctl_ficlone(2)
_HASHED_BYTES = 1024**2
_libc = ctypes.CDLL(None, use_errno=True)


def make_directory(path: Path, mode: int) -> None:
    """Create one directory with exactly this mode, whatever the umask; fine when it is there already."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
    if stat.S_IMODE(path.stat(follow_symlinks=False).st_mode) != mode:
        path.chmod(mode)


def make_scratch() -> Path:
    """A new private directory (0700) among the temporary files; whoever asked removes it."""
    import tempfile  # here, as others below: libvirt's hooks need none of it and pay for each import

    return Path(tempfile.mkdtemp(prefix="hvctl-"))


def write_file(path: Path, content: bytes, mode: int, *, group: int = -1) -> None:
    """Put a file there, replacing what was: written aside with this mode (and group), synced, renamed.

    A failure leaves nothing.
    """
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchown(descriptor, -1, group)
            os.fchmod(descriptor, mode)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        aside.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_directory(path.parent)


def remove_unwritten(folder: Path) -> None:
    """Remove what a `write_file` that was killed has left in a directory; the caller keeps others from writing there."""
    for name in list_names(folder):
        stem, _, token = name[1:].rpartition(".")
        if name.startswith(".") and stem and len(token) == 8:
            remove(folder / name)


def read_file(path: Path, *, limit_bytes: int = 16 * 1024**2) -> bytes:
    """The content of a regular file of at most `limit_bytes`; a link, a device or a longer file is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        if facts.st_size > limit_bytes:
            raise OSError(errno.EFBIG, "larger than expected", os.fspath(path))
        return stream.read(limit_bytes)


def read_head(path: Path, *, limit_bytes: int) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as stream:
        return stream.read(limit_bytes)


def send(path: Path, descriptor: int) -> None:
    """Write a file's content to an open descriptor."""
    import shutil

    with path.open("rb") as source, os.fdopen(descriptor, "wb", closefd=False) as target:
        shutil.copyfileobj(source, target, 1024**2)


def receive(descriptor: int, path: Path) -> None:
    """Write everything that comes from an open descriptor to a new file."""
    import shutil

    with os.fdopen(descriptor, "rb", closefd=False) as source, path.open("xb") as target:
        shutil.copyfileobj(source, target, 1024**2)


def publish(aside: Path, final: Path) -> None:
    """Give a finished file or directory its final name; FileExistsError when that is taken. Synced before and after."""
    sync_tree(aside)
    if _libc.renameat2(_AT_FDCWD, os.fsencode(aside), _AT_FDCWD, os.fsencode(final), _RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(final))
    sync_directory(final.parent)


def place(aside: Path, final: Path) -> None:
    """Give a finished file its name, on another file system too, where nothing must be; it appears whole or not at all.

    Where the file system cannot make a file without a name (O_TMPFILE), a crash can leave a `.part` beside it.
    """
    try:
        publish(aside, final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return
    import shutil

    part: Path | None = None
    try:
        descriptor = os.open(final.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        part = final.with_name(f"{final.name}.part")
        descriptor = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        with aside.open("rb") as source, os.fdopen(descriptor, "wb", closefd=False) as target:
            shutil.copyfileobj(source, target, 1024**2)
        os.fsync(descriptor)
        if part is None:
            # AT_SYMLINK_FOLLOW, as open(2) says under O_TMPFILE.
            os.link(f"/proc/self/fd/{descriptor}", final, follow_symlinks=True)
        else:
            publish(part, final)
    finally:
        os.close(descriptor)
        if part is not None:
            remove(part)
    sync_directory(final.parent)
    remove(aside)


def sync_tree(path: Path) -> None:
    """Bring a file, or all files directly in a directory, to the disk; a deeper tree by one syncfs(2)."""
    if path.is_dir() and any(child.is_dir() and not child.is_symlink() for child in path.iterdir()):
        sync_file_system(path)
        return
    for file in [*path.iterdir(), path] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file_system(path: Path) -> None:
    """Bring everything on the file system of a directory to the disk, and hear of any write to it that failed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole directory tree, never following links; fine when it is gone already."""
    try:
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        if os.path.lexists(path):
            raise


def _remove_tree(path: Path) -> None:
    """Both use directory descriptors, so that a link swapped in meanwhile is not followed. rm(1) alone takes any depth."""
    import shutil

    try:
        shutil.rmtree(path)
    except (RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EMFILE, errno.ENAMETOOLONG):
            raise
        done = _run(["rm", "-r", "-f", "--one-file-system", "--", os.fspath(path)])
        if done.returncode != 0:
            raise OSError(errno.EIO, os.fsdecode(done.stderr.strip()[-200:]), os.fspath(path)) from None


def _run(words: list[str]) -> subprocess.CompletedProcess[bytes]:
    """A program of coreutils, for what it does better."""
    import subprocess

    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False)


def copy(source: Path, target: Path) -> None:
    """Copy a file with all that it has, holes too, under a name that is free (cp(1))."""
    done = _run(
        ["cp", "--archive", "--reflink=auto", "--no-target-directory", "--", os.fspath(source), os.fspath(target)]
    )
    if done.returncode != 0:
        raise OSError(errno.EIO, os.fsdecode(done.stderr.strip()[-200:]), os.fspath(source))


def remove_empty(path: Path) -> None:
    """Remove a directory that has nothing in it; fine when it has, or is not there."""
    with contextlib.suppress(OSError):
        path.rmdir()


def hash_file(path: Path, look: Callable[[], None] | None = None) -> str:
    """SHA-256 of a file, in hex. `look` is called now and then, and may raise."""
    import hashlib

    digest, chunk = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(chunk):
            digest.update(chunk[:size])
            if look is not None:
                look()
    return digest.hexdigest()


def exists(path: Path) -> bool:
    """Whether something has this name, a broken link too."""
    return os.path.lexists(path)


def list_names(path: Path) -> list[str]:
    """The names in a directory, sorted; empty when it is not there."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def list_tree(path: Path) -> list[tuple[str, str]]:
    """Everything below a directory, each directory before what is in it: relative path; `/` for a directory, empty for
    a file, else where a link points."""
    found = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted((*folders, *names)):
            full = os.path.join(folder, name)
            link = os.readlink(full) if os.path.islink(full) else "/" if os.path.isdir(full) else ""
            found.append((os.path.relpath(full, path), link))
    return found


def available_bytes(path: Path) -> int:
    """Bytes that a process may still write on the file system of `path` (statvfs f_bavail)."""
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def set_mode(path: Path, mode: int) -> None:
    """Give a file exactly this mode; a link is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def set_time(path: Path, seconds: int) -> None:
    """Let a file or directory have been written at this time."""
    os.utime(path, (seconds, seconds), follow_symlinks=False)


def set_owner(path: Path, uid: int, gid: int) -> None:
    """Give a file or directory to somebody; a link itself, not what it points to."""
    os.chown(path, uid, gid, follow_symlinks=False)


def is_regular(path: Path) -> bool:
    """Whether this is a regular file itself, no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def is_directory(path: Path) -> bool:
    """Whether this is a directory, or a link to one."""
    return path.is_dir()


def is_plain_directory(path: Path) -> bool:
    """Whether this is a directory itself, no link to one."""
    return path.is_dir() and not path.is_symlink()


def is_link(path: Path) -> bool:
    """Whether this is a symbolic link."""
    return path.is_symlink()


def clone_file(source: Path, target: Path, mode: int) -> None:
    """A copy that shares its blocks where the file system can (FICLONE), made of full blocks where it cannot."""
    with source.open("rb") as from_, target.open("xb") as to:
        os.fchmod(to.fileno(), mode)
        try:
            fcntl.ioctl(to.fileno(), _FICLONE, from_.fileno())
        except OSError:
            remaining = os.fstat(from_.fileno()).st_size
            while remaining > 0:
                remaining -= os.copy_file_range(from_.fileno(), to.fileno(), remaining) or remaining


def link_or_clone(source: Path, target: Path, folder: Path) -> None:
    """A copy of a small file that is never written; one name more for an equal one, where a directory below `folder` has it."""
    content = read_file(source, limit_bytes=1024**3)
    for name in list_names(folder):
        other = folder / name / target.name
        if other != target and exists(other) and read_file(other, limit_bytes=1024**3) == content:
            os.link(other, target)
            return
    clone_file(source, target, 0o444)


def read_tail(path: Path, *, limit_bytes: int) -> bytes:
    """The last bytes of a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        stream.seek(max(0, os.fstat(descriptor).st_size - limit_bytes))
        return stream.read(limit_bytes)


def size(path: Path) -> int:
    """Size in bytes; 0 when it is not there."""
    try:
        return path.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def is_older(path: Path, seconds: float) -> bool:
    """Whether a file was last written longer ago than this; False when it is not there."""
    import time

    try:
        return time.time() - path.stat(follow_symlinks=False).st_mtime > seconds
    except FileNotFoundError:
        return False


def disk_usage(path: Path) -> int:
    """Bytes on the disk that a file or everything in a directory takes, on its own file system.

    A tree may be in use: what is there no more when it is looked at is not counted. Raises OSError.
    """
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode):
        return facts.st_blocks * 512
    done = _run(["du", "--summarize", "--one-file-system", "--count-links", "--block-size=1", "--", os.fspath(path)])
    gone = (b": No such file or directory", b": Not a directory")
    faults = [line for line in done.stderr.splitlines() if not line.endswith(gone)]
    if faults or not done.stdout:
        raise OSError(errno.EIO, os.fsdecode((faults or [b"it is gone"])[-1][-200:]), os.fspath(path))
    return int(done.stdout.split()[0])


def remove_directory(path: Path) -> None:
    """Remove one directory, which must be empty; fine when it is gone."""
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def replace_if_there(source: Path, target: Path) -> None:
    """Rename over the target; fine when the source has been renamed already."""
    with contextlib.suppress(FileNotFoundError):
        source.rename(target)
    sync_directory(target.parent)
