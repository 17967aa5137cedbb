"""What an overlay says in its upper directory beyond files: names that are gone, directories that hide those below.

A tar archive has no place for that which could not also be a guest's own file. So the archive of a layer is its `upper/`
without them, and beside it a file `marks` that lists them: `w PATH` (a whiteout) or `o PATH` (opaque), each ended by a zero.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hvctl.hostside import files, layers, refusal

NAME = "marks"
_OPAQUE, _WHITEOUT = b"o", b"w"
_LIMIT_BYTES = 1024**3
_DEEPEST, _LONGEST = 400, 4000
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Listing:
    """Everything in an upper directory, sorted: what an archive holds, and what stands in the marks."""

    def __init__(self, upper: Path) -> None:
        """Raises OSError for what could not be brought back: another kind of overlay, a tree that is too deep."""
        self.paths: list[bytes] = []
        """Relative to the directory, each directory before what is in it; the first is the directory itself, `.`."""
        self.with_holes: list[bytes] = []
        """Files that take less than their size."""
        self.left_out = 0
        """Device nodes, which no unprivileged container has."""
        self._marks: list[bytes] = []
        self._walk(os.fsencode(upper), b"", 0)

    @property
    def marks(self) -> bytes:
        return b"".join(mark + b"\0" for mark in self._marks)

    def _walk(self, folder: bytes, path: bytes, depth: int) -> None:
        if depth > _DEEPEST or len(path) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, "deeper than a backup can hold", os.fsdecode(folder))
        self.paths.append(path or b".")
        layers.check_kind(Path(os.fsdecode(folder)))
        if path and layers.is_opaque(Path(os.fsdecode(folder))):
            self._marks.append(_OPAQUE + path)
        for name in sorted(os.listdir(folder)):
            full, below = os.path.join(folder, name), (path + b"/" + name if path else name)
            facts = os.lstat(full)
            mode = facts.st_mode
            if stat.S_ISDIR(mode):
                self._walk(full, below, depth + 1)
            elif layers.is_whiteout(Path(os.fsdecode(full))):
                self._marks.append(_WHITEOUT + below)
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                self.left_out += 1
            elif not stat.S_ISSOCK(mode):  # whoever listens there makes it anew
                layers.check_kind(Path(os.fsdecode(full)))
                self.paths.append(below)
                if stat.S_ISREG(mode) and facts.st_blocks * 512 < facts.st_size:
                    self.with_holes.append(full)


def apply(tree: Path) -> str:
    """Do in a directory what the file `marks` beside it says, and remove that; why it cannot be done, or nothing."""
    path = tree.parent / NAME
    for mark in files.read_file(path, limit_bytes=_LIMIT_BYTES).split(b"\0")[:-1]:
        *way, name = mark[1:].split(b"/")
        if mark[:1] not in (_OPAQUE, _WHITEOUT) or any(part in (b"", b".", b"..") for part in (*way, name)):
            return f"the mark {refusal.quote(mark)}"
        try:
            for folder in _open(tree, way):
                _apply(mark[:1], folder, name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENAMETOOLONG):
                raise
            return f"the mark {refusal.quote(mark)}: {error.strerror}"
    files.remove(path)
    return ""


def _open(tree: Path, way: list[bytes]) -> Iterator[int]:
    """The directory that a way leads to, following no link, for one turn of a loop; it keeps its time."""
    descriptor = os.open(tree, _FOLDER)
    try:
        for part in way:
            below = os.open(part, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        facts = os.fstat(descriptor)
        yield descriptor
        os.utime(descriptor, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    finally:
        os.close(descriptor)


def _apply(kind: bytes, folder: int, name: bytes) -> None:
    if kind == _WHITEOUT:
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=folder)
        return
    descriptor = os.open(name, _FOLDER, dir_fd=folder)
    try:
        layers.make_opaque(descriptor)
    finally:
        os.close(descriptor)
