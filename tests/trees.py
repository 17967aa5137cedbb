"""A file tree as values that can be compared: two trees are equal when their `describe` is."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Path -> type and mode, owner, time in seconds, size, content or target, attributes, other names of the file."""
    found: dict[str, tuple[object, ...]] = {}
    names: dict[tuple[int, int], list[str]] = {}
    for folder, folders, files in os.walk(root):
        for path in [Path(folder), *(Path(folder, name) for name in files)] + [
            Path(folder, name) for name in folders if Path(folder, name).is_symlink()
        ]:
            facts = path.lstat()
            key = str(path.relative_to(root))
            content: object = ""
            if stat.S_ISREG(facts.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)
            attributes = tuple(
                (name, os.getxattr(path, name, follow_symlinks=False))
                for name in sorted(os.listxattr(path, follow_symlinks=False))
            )
            if not stat.S_ISDIR(facts.st_mode):
                names.setdefault((facts.st_dev, facts.st_ino), []).append(key)
            size = 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
            found[key] = (facts.st_mode, facts.st_uid, facts.st_gid, int(facts.st_mtime), size, content, attributes)
    for group in names.values():
        for key in group:
            found[key] = (*found[key], tuple(sorted(group)))
    return found
