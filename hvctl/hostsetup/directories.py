"""The store's and the run directory's skeleton, with the modes that `store.py` documents."""

from __future__ import annotations

import functools
import grp
import shutil
from collections.abc import Iterator
from pathlib import Path

from hvctl.host import Host
from hvctl.hostsetup.change import Change
from hvctl.hostside import files

_GROUP = "libvirt"


def missing(host: Host) -> Iterator[Change]:
    for path, mode in _wanted(host):
        if not path.is_dir() or path.stat().st_mode & 0o7777 != mode:
            make = functools.partial(_make, host, path, mode)
            yield Change(text=f"create directory {path} ({mode:04o})", apply=make)


def present(host: Host) -> Iterator[Change]:
    """Only what is empty: data is never taken back. Locks are no data."""
    for path, _mode in reversed(_wanted(host)):
        if path == host.store.run and path.is_dir():
            yield Change(text=f"remove directory {path}", apply=functools.partial(_remove_run, path))
        elif path.is_dir() and path != host.store.locks and not any(_content(path, host)):
            yield Change(text=f"remove empty directory {path}", apply=functools.partial(_remove_empty, path))


def _wanted(host: Host) -> list[tuple[Path, int]]:
    store = host.store
    return [
        (store.root, 0o711),
        *((path, 0o711) for path in (store.images, store.tags, store.layers, store.instances, store.volumes)),
        (store.root / "renaming", 0o711),
        (store.building, 0o700),
        (store.downloads, 0o700),
        (store.run, 0o755),
        (store.locks, 0o2770),
    ]


def _make(host: Host, path: Path, mode: int) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, mode=0o755)
    host.shell.call(files.make_directory, path, mode)
    if path == host.store.locks:
        try:
            shutil.chown(path, group=grp.getgrnam(_GROUP).gr_gid)
        except KeyError:  # no such group on this distribution: root alone works then
            return
        path.chmod(mode)  # chown(2) takes the set-group-ID bit away


def _content(path: Path, host: Host) -> Iterator[Path]:
    """What would be left in a directory once the empty directories of the skeleton are gone."""
    skeleton = {wanted for wanted, _mode in _wanted(host)}
    return (child for child in path.iterdir() if child not in skeleton or any(child.iterdir()))


def _remove_empty(path: Path) -> None:
    if not any(path.iterdir()):
        path.rmdir()


def _remove_run(path: Path) -> None:
    for child in (path / "locks", path / "accel.json", path / "last-address"):
        files.remove(child)
    _remove_empty(path)
