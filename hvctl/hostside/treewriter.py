"""A tree that is filled from an archive: every name is resolved here, component by component, below the tree's root.

The process has changed its root to the tree before, so that nothing can lie outside. Resolving is still done here and
not by the kernel, since symbolic links could otherwise build a tree deeper, or with longer paths, than anything that has
to read or remove it later can follow. Links in the way are followed inside the tree, as OCI runtimes do (`bin/x` goes
to `usr/bin/x` where a lower layer made `bin` a link).

Directories keep the time that the archive gave them, whatever is put into them afterwards; those that no entry names
are root's, 0755, of 1970. Memory does not grow with the tree, but for one number for each entry of an upper layer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from hvctl.hostside.beside import Tasks
from hvctl.hostside.bytestream import Stream, copy_part
from hvctl.hostside.refusal import Refused, Unable, quote
from hvctl.hostside.tarstream import Entry, Kind

R = TypeVar("R")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_KEPT_OPEN, _MOST_OPEN = 64, 700
# Contents that another thread copies: worth its while, and so few bytes that all which wait are less than what is to stay
# free (`Bounds.reserve_bytes`).
_LEAST_LEFT_BYTES, _MOST_LEFT_BYTES = 96 * 1024, 4 * 1024**2
_MOST_WAYS = 4096
_MOST_LINKS = 40
_LONGEST_NAME = 255
_LONGEST_LINK = 4095
_MOST_ATTRIBUTE_BYTES = 65536
# Others are left out: they mean something to one security module, to another system (`com.apple.`), or to the host's
# overlays.
_KEPT_ATTRIBUTES = (b"user.", b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default")
_OVERLAYS_ATTRIBUTES = b"user.overlay."
_ACL_VERSION = b"\2\0\0\0"  # POSIX_ACL_XATTR_VERSION


class _Open:
    """A directory that is held open, and the times that it is to have."""

    def __init__(self, descriptor: int, path: tuple[bytes, ...]) -> None:
        facts = os.fstat(descriptor)
        self.descriptor = descriptor
        self.path = path
        self.path_bytes = sum(map(len, path)) + len(path)
        self.times = (facts.st_mtime_ns, facts.st_mtime_ns)
        self.is_changed = False
        self.gives_group = bool(facts.st_mode & stat.S_ISGID)

    def close(self) -> None:
        if self.is_changed:
            os.utime(self.descriptor, ns=self.times)
        os.close(self.descriptor)


class Tree:
    """The tree at the root directory of this process."""

    def __init__(self, *, depth: int, path_bytes: int, is_upper: bool) -> None:
        """`is_upper`: what is there already is a lower layer's, and may be whited out."""
        self._depth = depth
        self._path_bytes = path_bytes
        # Trimmed between entries only: what one entry is about stays open.
        self._open: OrderedDict[tuple[bytes, ...], _Open] = OrderedDict()
        self._ways: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}
        self._tasks = Tasks()
        self._mine: set[int] | None = set() if is_upper else None

    def close(self) -> None:
        """Wait for the last contents, and give all directories their times."""
        self._tasks.finish()
        while self._open:
            self._open.popitem()[1].close()

    def add(self, entry: Entry, stream: Stream) -> None:
        """Make what an entry says, in place of what has its name; a directory stays and changes."""
        self._trim()
        names = self._split(entry.name)
        if not names:
            if entry.kind is not Kind.DIRECTORY:
                raise Refused(f"it replaces the root by a {entry.kind.value}")
            self._set_directory(self._find(()), entry)
            return
        parent, name = self._find(names[:-1]), names[-1]
        self._check_size(parent, name)
        if self._mine is not None:
            self._mine.add(hash((*parent.path, name)))
        match entry.kind:
            case Kind.FILE:
                self._add_file(parent, name, entry, stream)
            case Kind.DIRECTORY:
                self._add_directory(parent, name, entry)
            case Kind.SYMLINK:
                self._add_symlink(parent, name, entry)
            case Kind.HARD_LINK:
                self._add_hard_link(parent, name, entry)
            case Kind.FIFO:
                self._make(parent, name, lambda: os.mkfifo(name, 0o600, dir_fd=parent.descriptor))
                self._set_named(parent, name, entry)
            case Kind.DEVICE if parent.path[:1] != (b"dev",):
                raise Refused(f"{quote(entry.name)} is a device")
            case Kind.DEVICE:
                pass  # every guest has a /dev of its own

    def white_out(self, entry: Entry) -> bool:
        """Do what an entry of an OCI layer says about lower layers, if it is such a one."""
        if b".wh." not in entry.name:
            return False
        *way, name = self._split(entry.name) or (b"",)
        if any(part.startswith(b".wh.") for part in way):
            raise Refused(f"{quote(entry.name)} lies in a whiteout")
        if not name.startswith(b".wh."):
            return False
        self._trim()
        parent = self._seek(tuple(way), make=False)
        if name == b".wh..wh..opq":
            if parent is not None:
                self._empty_lower(parent.descriptor, parent.path)
                parent.is_changed = True
            return True
        if name.startswith(b".wh..wh."):
            return True  # AUFS's own: names of its bookkeeping, nothing of the image
        victim = name[4:]
        if victim in (b"", b".", b".."):
            raise Refused(f"{quote(entry.name)} removes no name")
        if parent is not None:
            self._remove_lower(parent.descriptor, victim, (*parent.path, victim))
            parent.is_changed = True
        return True

    def _split(self, name: bytes) -> tuple[bytes, ...]:
        """The components of an entry's name. Raises Refused for a name that does not stay below the root."""
        if name.startswith(b"/"):
            raise Refused(f"{quote(name)} is an absolute name")
        if len(name) > self._path_bytes:
            raise Refused(f"{quote(name)} is a longer name than {self._path_bytes} bytes")
        names = tuple([part for part in name.split(b"/") if part and part != b"."])
        if b".." in names:
            raise Refused(f"{quote(name)} leads upwards")
        if b"\0" in name:
            raise Refused(f"{quote(name)} has a zero byte in it")
        return names

    def _check_size(self, parent: _Open, name: bytes) -> None:
        if len(name) > _LONGEST_NAME:
            raise Refused(f"{quote(name)} is a longer name than {_LONGEST_NAME} bytes")
        if len(parent.path) >= self._depth:
            raise Refused(f"{quote(b'/'.join((*parent.path, name)))} is deeper than {self._depth} directories")
        if parent.path_bytes + len(name) > self._path_bytes:
            raise Refused(f"{quote(b'/'.join((*parent.path, name)))} is a longer path than {self._path_bytes} bytes")

    # Directories: found by the way that an entry gives, held by where they really are.

    def _find(self, way: tuple[bytes, ...]) -> _Open:
        """The directory that a way leads to, made where it is missing."""
        found = self._seek(way, make=True)
        assert found is not None
        return found

    def _seek(self, way: tuple[bytes, ...], *, make: bool) -> _Open | None:
        """The directory that a way leads to; None where it is missing, unless it is to be made."""
        path = self._ways.get(way)
        known = None if path is None else self._open.get(path)
        if known is not None:
            self._open.move_to_end(known.path)
            return known
        found = self._walk(way, make=make)
        if found is not None:
            if len(self._ways) >= _MOST_WAYS:
                self._ways.clear()
            self._ways[way] = found.path
        return found

    def _walk(self, way: Sequence[bytes], *, make: bool) -> _Open | None:
        here = self._enter(None, b"/", ())
        todo = deque(way)
        links = 0
        while todo:
            name = todo.popleft()
            if name == b"..":  # of a link's target; at the root it stays there, as chroot(2) says
                here = self._find(here.path[:-1])
                continue
            path = (*here.path, name)
            self._check_size(here, name)
            try:
                here = self._enter(here, name, path)
                continue
            except FileNotFoundError:
                target = None
                is_missing = True
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                target = self._read_link(here, name)
                is_missing = False
            if target is not None:
                links += 1
                if links > _MOST_LINKS:
                    raise Refused(f"{quote(b'/'.join(way))} leads through too many links")
                if target.startswith(b"/"):
                    here = self._enter(None, b"/", ())
                todo.extendleft(reversed([part for part in target.split(b"/") if part not in (b"", b".")]))
            elif not make:
                return None
            elif is_missing:
                self._make_implicit(here, name)
            else:
                raise Refused(f"{quote(b'/'.join(path))} is no directory, but something is to be in it")
            if target is None:
                here = self._enter(here, name, path)
        return here

    def _enter(self, parent: _Open | None, name: bytes, path: tuple[bytes, ...]) -> _Open:
        known = self._open.get(path)
        if known is not None:
            self._open.move_to_end(path)
            return known
        if len(self._open) > _MOST_OPEN:
            raise Refused(f"{quote(b'/'.join(path))} is found through too many directories")
        descriptor = os.open(name, _DIRECTORY, dir_fd=None if parent is None else parent.descriptor)
        found = self._open[path] = _Open(descriptor, path)
        return found

    def _trim(self) -> None:
        while len(self._open) > _MOST_KEPT_OPEN:
            self._open.popitem(last=False)[1].close()

    def _make_implicit(self, parent: _Open, name: bytes) -> None:
        parent.is_changed = True
        os.mkdir(name, 0o755, dir_fd=parent.descriptor)
        os.chown(name, 0, 0, dir_fd=parent.descriptor)
        os.chmod(name, 0o755, dir_fd=parent.descriptor)
        os.utime(name, ns=(0, 0), dir_fd=parent.descriptor)

    def _read_link(self, parent: _Open, name: bytes) -> bytes | None:
        try:
            return os.readlink(name, dir_fd=parent.descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None

    def _forget(self, path: tuple[bytes, ...]) -> None:
        """A directory or link is taken away: nothing that was found through it holds any more."""
        self._ways.clear()
        for known in [known for known in self._open if known[: len(path)] == path]:
            os.close(self._open.pop(known).descriptor)

    # Making.

    def _make(self, parent: _Open, name: bytes, make: Callable[[], R]) -> R:
        """Call what makes something of this name; what has the name already goes first."""
        parent.is_changed = True
        try:
            return make()
        except FileExistsError:
            self._remove(parent.descriptor, name, (*parent.path, name))
            return make()

    def _add_file(self, parent: _Open, name: bytes, entry: Entry, stream: Stream) -> None:
        descriptor = self._make(parent, name, lambda: os.open(name, _NEW_FILE, 0o600, dir_fd=parent.descriptor))
        is_long = entry.pieces is None and _LEAST_LEFT_BYTES <= entry.size <= _MOST_LEFT_BYTES
        place = stream.skip(entry.size) if is_long else None
        if place is None:
            self._fill(descriptor, entry, parent.gives_group, partial(_copy, stream, entry))
        else:
            copy = partial(copy_part, stream.descriptor, place, entry.size)
            self._tasks.add(partial(self._fill, descriptor, entry, parent.gives_group, copy))

    def _fill(self, descriptor: int, entry: Entry, gives_group: bool, copy: Callable[[int], None]) -> None:
        """Write a new file's content, give it all the rest, and close it."""
        try:
            copy(descriptor)
            # Owner, attributes, mode: chown(2) takes capabilities and setuid bits away, and so does writing.
            if entry.uid or entry.gid or gives_group:
                os.fchown(descriptor, entry.uid, entry.gid)
            if entry.attributes:
                self._set_attributes(descriptor, entry)
            os.fchmod(descriptor, entry.mode)
            os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(descriptor)

    def _add_directory(self, parent: _Open, name: bytes, entry: Entry) -> None:
        def make() -> None:
            os.mkdir(name, 0o700, dir_fd=parent.descriptor)

        path = (*parent.path, name)
        try:
            parent.is_changed = True
            make()
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent.descriptor, follow_symlinks=False).st_mode):
                self._make(parent, name, make)
        self._set_directory(self._enter(parent, name, path), entry)

    def _set_directory(self, directory: _Open, entry: Entry) -> None:
        descriptor = directory.descriptor
        os.fchown(descriptor, entry.uid, entry.gid)
        if self._mine is not None:
            for attribute in os.listxattr(descriptor):
                if os.fsencode(attribute).startswith(_KEPT_ATTRIBUTES):  # the host's security module keeps its own
                    os.removexattr(descriptor, attribute)
        self._set_attributes(descriptor, entry)
        os.fchmod(descriptor, entry.mode)
        directory.times = (entry.mtime_ns, entry.mtime_ns)
        directory.gives_group = bool(entry.mode & stat.S_ISGID)
        directory.is_changed = True

    def _add_symlink(self, parent: _Open, name: bytes, entry: Entry) -> None:
        if not 0 < len(entry.link) <= _LONGEST_LINK or b"\0" in entry.link:
            raise Refused(f"{quote(entry.name)} is a link to nothing that could be a name")
        self._make(parent, name, lambda: os.symlink(entry.link, name, dir_fd=parent.descriptor))
        self._set_named(parent, name, entry)

    def _set_named(self, parent: _Open, name: bytes, entry: Entry) -> None:
        at = parent.descriptor
        os.chown(name, entry.uid, entry.gid, dir_fd=at, follow_symlinks=False)
        if entry.kind is not Kind.SYMLINK:
            os.chmod(name, entry.mode, dir_fd=at)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=at, follow_symlinks=False)

    def _add_hard_link(self, parent: _Open, name: bytes, entry: Entry) -> None:
        """Names a file that is there, of this layer or a lower one; that file's owner, mode and times stay."""
        names = self._split(entry.link.lstrip(b"/"))
        target = self._seek(names[:-1], make=False) if names else None
        if target is None or not self._is_linkable(target, names[-1]):
            raise Refused(f"{quote(entry.name)} is a hard link to {quote(entry.link)}, which is no file here")
        source, path = (*target.path, names[-1]), (*parent.path, name)
        if source[: len(path)] == path:
            raise Refused(f"{quote(entry.name)} is a hard link to what it replaces")
        at = target.descriptor
        self._make(
            parent,
            name,
            lambda: os.link(names[-1], name, src_dir_fd=at, dst_dir_fd=parent.descriptor, follow_symlinks=False),
        )

    def _is_linkable(self, parent: _Open, name: bytes) -> bool:
        try:
            mode = os.stat(name, dir_fd=parent.descriptor, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return False
        return not stat.S_ISDIR(mode)

    def _set_attributes(self, descriptor: int, entry: Entry) -> None:
        for name, value in entry.attributes:
            if not is_kept(name):
                continue
            is_old = name.startswith(b"system.") and not value.startswith(_ACL_VERSION)
            if is_old or len(name) > _LONGEST_NAME or b"\0" in name or len(value) > _MOST_ATTRIBUTE_BYTES:
                raise Refused(f"{quote(entry.name)} has an impossible attribute, {quote(name)}")
            try:
                os.setxattr(descriptor, name, value)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ERANGE, errno.E2BIG):
                    raise Refused(f"{quote(entry.name)} has an impossible attribute, {quote(name)}") from error
                if error.errno in (errno.ENOTSUP, errno.ENOSPC):
                    reason = "keeps no such attributes" if error.errno == errno.ENOTSUP else "has no place for it"
                    raise Unable(f"the attribute {quote(name)} is lost: the file system {reason}") from error
                raise

    # Taking away. Depth is limited, so recursion is.

    def _remove(self, at: int, name: bytes, path: tuple[bytes, ...]) -> None:
        """Remove whatever has this name."""
        mode = os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            self._forget(path)
        if not stat.S_ISDIR(mode):
            os.unlink(name, dir_fd=at)
            return
        descriptor = os.open(name, _DIRECTORY, dir_fd=at)
        try:
            for child in map(os.fsencode, os.listdir(descriptor)):
                self._remove(descriptor, child, (*path, child))
        finally:
            os.close(descriptor)
        os.rmdir(name, dir_fd=at)

    def _remove_lower(self, at: int, name: bytes, path: tuple[bytes, ...]) -> None:
        """Remove what lower layers have under this name; what this layer has made stays, whatever came first."""
        try:
            mode = os.stat(name, dir_fd=at, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return
        is_mine = self._mine is None or hash(path) in self._mine
        if not stat.S_ISDIR(mode):
            if not is_mine:
                self._remove(at, name, path)
            return
        descriptor = os.open(name, _DIRECTORY, dir_fd=at)
        try:
            times = os.fstat(descriptor).st_mtime_ns
            self._empty_lower(descriptor, path)
            os.utime(descriptor, ns=(times, times))
        finally:
            os.close(descriptor)
        if not is_mine:
            with contextlib.suppress(OSError):  # not empty: something of this layer is in it
                os.rmdir(name, dir_fd=at)
                self._forget(path)

    def _empty_lower(self, descriptor: int, path: tuple[bytes, ...]) -> None:
        for child in map(os.fsencode, os.listdir(descriptor)):
            self._remove_lower(descriptor, child, (*path, child))


def _copy(stream: Stream, entry: Entry, descriptor: int) -> None:
    """Write what the stream has of a file; its holes stay holes."""
    if entry.pieces is None:
        stream.copy(entry.size, descriptor)
        return
    for offset, length in entry.pieces:
        os.lseek(descriptor, offset, os.SEEK_SET)
        stream.copy(length, descriptor)
    os.ftruncate(descriptor, entry.full_size)


def is_kept(attribute: bytes) -> bool:
    """Whether an extended attribute of this name is written into a tree."""
    return attribute.startswith(_KEPT_ATTRIBUTES) and not attribute.startswith(_OVERLAYS_ATTRIBUTES)
