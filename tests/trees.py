"""What a tree is, down to the last attribute, so that two can be compared."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def fingerprint(root: Path, *, but: str = "") -> dict[str, tuple[Any, ...]]:
    """Everything about every file below: kind, mode, owner, time, content, attributes, links; no times of the root.

    `but`: a name at the top that is left out, with all below it.
    """
    found: dict[str, tuple[Any, ...]] = {}
    first: dict[int, str] = {}
    for path in sorted(root.rglob("*")):
        name = os.fsdecode(os.path.relpath(os.fsencode(path), os.fsencode(root)))
        if but and name.split("/")[0] == but:
            continue
        facts = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        same = "" if path.is_dir() and not path.is_symlink() else first.setdefault(facts.st_ino, name)
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        found[name] = (oct(facts.st_mode), facts.st_uid, facts.st_gid, facts.st_mtime_ns, content, same, attributes)
    return found
