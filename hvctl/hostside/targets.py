"""Places in a container's root at which libvirt mounts something, made ready while nobody can change them.

libvirt mounts by path after pivot_root(2), with the host's root still there as `/.oldroot`, and follows what it meets on
the way. A link put there from inside would lead it into the host: by two of them a directory of the host's was seen in an
unprivileged container (libvirt 9.0). So every directory on the way is a real one before a container starts. What is in the
way is the container's own, and put aside: `NAME.aside`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

_ALWAYS = ("/.oldroot", "/proc", "/sys", "/dev")
"""What libvirt itself uses by path."""
_MOUNTED_BEFORE = ("/proc/", "/sys/", "/dev/")
"""Nothing from inside has been in these by then: they are new at each start."""
_PATH_ONLY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_ASIDE = 100


def make_ready(root: Path, owner: int, targets: Iterable[str]) -> None:
    """Make each target a directory of its own in a mounted root. Raises OSError for one that lies in another.

    Who writes to what is mounted on the outer one, a directory that is shared with others say, could lead the inner one
    elsewhere.
    """
    wanted = [target for target in targets if not target.startswith(_MOUNTED_BEFORE) and target != "/"]
    for target in wanted:
        outer = next((other for other in wanted if target.startswith(f"{other}/")), None)
        if outer is not None:
            raise OSError(f"{target!r} lies in {outer!r}, where something else is mounted; next: virsh edit")
    top = os.open(root, _PATH_ONLY)
    try:
        for target in (*_ALWAYS, *wanted):
            _make(top, target.strip("/").split("/"), owner, only_if_there=target in _ALWAYS)
    finally:
        os.close(top)


def find_obstacle(tree: Path, target: str) -> str:
    """The first part of the way to a target that is there and no directory; an empty string when there is none."""
    with contextlib.ExitStack() as stack:
        here = os.open(tree, _PATH_ONLY)
        stack.callback(os.close, here)
        names = target.strip("/").split("/")
        for count, name in enumerate(names, 1):
            if not _is_directory(here, name):
                return "/" + "/".join(names[:count]) if _exists(here, name) else ""
            here = os.open(name, _PATH_ONLY, dir_fd=here)
            stack.callback(os.close, here)
    return ""


def find_outer(target: str, others: Iterable[str]) -> str:
    """The first of these that a target lies in, or that lies in it; an empty string where none does."""
    return next((other for other in others if target.startswith(f"{other}/") or other.startswith(f"{target}/")), "")


def _make(top: int, names: list[str], owner: int, *, only_if_there: bool) -> None:
    with contextlib.ExitStack() as stack:
        here = top
        for name in names:
            if not _is_directory(here, name):
                if not _put_aside(here, name) and only_if_there:
                    return
                os.mkdir(name, 0o755, dir_fd=here)
                os.chown(name, owner, owner, dir_fd=here, follow_symlinks=False)
            here = os.open(name, _PATH_ONLY, dir_fd=here)
            stack.callback(os.close, here)


def _is_directory(here: int, name: str) -> bool:
    try:
        os.close(os.open(name, _PATH_ONLY, dir_fd=here))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _put_aside(here: int, name: str) -> bool:
    """Whether there was something."""
    if not _exists(here, name):
        return False
    for number in range(_MOST_ASIDE):
        aside = f"{name}.aside{number or ''}"
        if not _exists(here, aside):
            os.rename(name, aside, src_dir_fd=here, dst_dir_fd=here)
            return True
    raise OSError(errno.EEXIST, "too much was put aside already", name)


def _exists(here: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=here, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
