"""Layers on the disk: what each stands on, whether one was ever written, and several made one.

    layers/ID/layer.json   {"first_id": 1879048192, "parent": "ID"}: whose owners are in it, and the layer below; "" is the image

A layer that is not the top of an instance is never written again. It may be *replaced*, by one rename: by a merger of
itself and layers below it, which shows the same to everybody who stands on it. Whoever has the old one open keeps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from hvctl.hostside import files

_OPAQUE = "trusted.overlay.opaque"
# What an overlay writes only with options that ours never has.
_FOREIGN = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_QCOW2_L1 = struct.Struct(">36xIQ")  # qemu's docs/interop/qcow2.txt: l1_size at byte 36, l1_table_offset at 40
_DEEPEST = 1000
_libc = ctypes.CDLL(None, use_errno=True)


class Facts:
    """What a layer says of itself: the first uid of the container that wrote it (0 for a VM's), and its parent."""

    def __init__(self, first_id: int = 0, parent: str = "") -> None:
        self.first_id = first_id
        self.parent = parent


def write_facts(layer: Path, facts: Facts) -> None:
    """Say what a layer stands on and whose owners are in it."""
    import json  # here and below: most containers stand on no layer but their own, and each start waits for the hook

    content = json.dumps({"first_id": facts.first_id, "parent": facts.parent}).encode()
    files.write_file(layer / "layer.json", content, 0o400)


def read_facts(layer: Path) -> Facts:
    """What a layer says of itself; that it stands on the image where it says nothing, or is not there."""
    import json

    try:
        said = json.loads(files.read_file(layer / "layer.json"))
    except FileNotFoundError:
        return Facts()
    return Facts(first_id=int(said["first_id"]), parent=str(said.get("parent", "")))


def list_stack(folder: Path, top: str) -> list[str]:
    """The layers that end with this one, lowest first; none for the image itself.

    Ends at a layer that is gone: whoever removes a stack removes the lowest first. Raises OSError for a circle.
    """
    found: list[str] = []
    while top and os.path.lexists(folder / top):
        if top in found or len(found) > _DEEPEST:
            raise OSError(errno.ELOOP, "the layer stands on itself", os.fspath(folder / top))
        found.insert(0, top)
        top = read_facts(folder / top).parent
    return found


def is_untouched_disk(path: Path) -> bool:
    """Whether a qcow2 overlay that hvctl made has no cluster of its own: all entries of its L1 table are zero."""
    with path.open("rb") as stream:
        count, offset = _QCOW2_L1.unpack(stream.read(_QCOW2_L1.size))
        stream.seek(offset)
        return not any(stream.read(count * 8))


def is_untouched_upper(upper: Path, below: Path | None) -> bool:
    """Whether nothing was written to a container's layer: only the directories are there that it was made with."""
    wanted = {"": ["sys"], "sys": ["fs"], "sys/fs": ["cgroup"], "sys/fs/cgroup": []}
    for name, content in wanted.items():
        folder = upper / name
        if not folder.is_dir() or sorted(os.listdir(folder)) != content:
            return False
    return below is None or _owner_and_mode(upper) == _owner_and_mode(below)


def inherit(upper: Path, below: Path) -> None:
    """Give the root of a new layer the owner, mode and attributes that the root of the one below has."""
    _copy_attributes(below, upper)


def merge_uppers(uppers: Sequence[Path], below: Sequence[Path], target: Path) -> None:
    """Make one upper directory that shows on `below` what these show on it; all lowest first.

    Files are links to those that are there: nothing is copied, nothing is written. Raises OSError for what an overlay
    with other options than ours has written.
    """
    _merge([*reversed(uppers)], [*reversed(below)], target, {})


def add_whiteouts(upper: Path, names: Sequence[str]) -> None:
    """Say in a layer that no container has seen yet that these names are gone. No link in it is followed.

    Raises OSError for a name whose directory is not there, or that is there itself.
    """
    known = {upper}
    for name in names:
        parts = name.split("/")
        if not all(part not in ("", ".", "..") for part in parts):
            raise OSError(errno.EINVAL, "not a name below the root", name)
        folder = upper
        for part in parts[:-1]:
            folder = folder / part
            if folder not in known and not _is_directory(folder):
                raise OSError(errno.ENOTDIR, "not a directory", os.fspath(folder))
            known.add(folder)
        facts = folder.lstat()
        os.mknod(folder / parts[-1], stat.S_IFCHR, os.makedev(0, 0))
        os.utime(folder, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def replace(layer: Path, aside: Path) -> None:
    """Put what is aside in the place of a layer, and that aside: one rename(2), after a sync."""
    files.sync_tree(aside)
    done = _libc.renameat2(_AT_FDCWD, os.fsencode(aside), _AT_FDCWD, os.fsencode(layer), _RENAME_EXCHANGE)
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(layer))
    files.sync_directory(layer.parent)


def seal(path: Path, reader: int) -> None:
    """Make a disk that is written no more root's, for a group to read: it holds what a guest wrote."""
    files.set_mode(path, 0o440)
    os.chown(path, 0, reader, follow_symlinks=False)


def sync_new(layer: Path) -> None:
    """Bring a layer in which nothing has been written yet to the disk, and its name."""
    for name in os.listdir(layer):
        path = layer / name
        files.sync_directory(path) if path.is_dir() else files.sync_tree(path)
    files.sync_directory(layer)
    files.sync_directory(layer.parent)


def _merge(sources: Sequence[Path], below: Sequence[Path], target: Path, copies: dict[int, Path]) -> None:
    """`sources`: the same directory in several layers, topmost first; `below`: what of it shows through from below.

    Where nothing does there must be no whiteout: in a directory of a single layer the kernel lists them as files.
    `copies`: by inode, what has as many links as it may.
    """
    os.mkdir(target, 0o700)
    found: dict[str, list[Path]] = {}
    for source in sources:
        for name in os.listdir(source):
            found.setdefault(name, []).append(source / name)
    for name, paths in found.items():
        if not _is_directory(paths[0]):
            if below or not is_whiteout(paths[0]):
                _link(paths[0], target / name, copies)
            continue
        merged, hides = _find_merged(paths)
        through = [] if hides else _find_merged([path / name for path in below if os.path.lexists(path / name)])[0]
        _merge(merged, through, target / name, copies)
        if below and not through:
            make_opaque(target / name)
    _copy_attributes(sources[0], target)


def _find_merged(paths: Sequence[Path]) -> tuple[list[Path], bool]:
    """Those of an entry's appearances, topmost first, that make one directory; whether they hide all others below."""
    merged: list[Path] = []
    for path in paths:
        if not _is_directory(path):
            return merged, True
        merged.append(path)
        if is_opaque(path):
            return merged, True
    return merged, False


def check_kind(path: Path) -> None:
    """Raise OSError for what an overlay with other options than ours has written."""
    for name in os.listxattr(path, follow_symlinks=False):
        if name in _FOREIGN:
            raise OSError(errno.EOPNOTSUPP, "another kind of overlay wrote this layer", os.fspath(path))


def _link(source: Path, target: Path, copies: dict[int, Path]) -> None:
    check_kind(source)
    inode = source.lstat().st_ino
    try:
        os.link(copies.get(inode, source), target, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EMLINK:
            raise
        if is_whiteout(source):  # newer kernels share one among all of a layer
            os.mknod(target, stat.S_IFCHR, os.makedev(0, 0))
            return
        files.copy(source, target)
        copies[inode] = target


def _is_directory(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def is_whiteout(path: Path) -> bool:
    """Whether this is how an overlay says that a name is gone."""
    facts = path.lstat()
    return stat.S_ISCHR(facts.st_mode) and facts.st_rdev == os.makedev(0, 0)


def is_opaque(path: Path) -> bool:
    """Whether a directory hides the ones of its name below."""
    try:
        return os.getxattr(path, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def make_opaque(directory: Path | int) -> None:
    """Let a directory (its path, or a descriptor) hide the ones of its name below."""
    os.setxattr(directory, _OPAQUE, b"y")


def _owner_and_mode(path: Path) -> tuple[int, int, int]:
    facts = path.lstat()
    return facts.st_uid, facts.st_gid, facts.st_mode


def _copy_attributes(source: Path, target: Path) -> None:
    """Owner, mode, times and extended attributes of a directory; not those that say how an overlay uses it."""
    facts = source.lstat()
    os.chown(target, facts.st_uid, facts.st_gid, follow_symlinks=False)
    os.chmod(target, stat.S_IMODE(facts.st_mode))
    check_kind(source)
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith("trusted.overlay."):
            with contextlib.suppress(FileNotFoundError):
                os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False))
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
