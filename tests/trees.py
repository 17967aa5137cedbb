"""What a tree is, down to the last attribute, so that two can be compared."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

View = dict[str, tuple[int, int, str]]


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


def view(root: Path) -> View:
    """What `snapshot diff` looks at: kind and mode, owner, content."""
    found: View = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            facts = path.lstat()
            content = ""
            if stat.S_ISREG(facts.st_mode):
                content = path.read_text()
            elif stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)
            found[f"/{path.relative_to(root)}"] = (facts.st_mode, facts.st_uid, content)
    return found


def scribble(root: Path, dice: random.Random) -> None:
    """One change that a guest could make."""
    paths = [Path(folder, name) for folder, folders, names in os.walk(root) for name in (*folders, *names)]
    folders = [root, *(path for path in paths if path.is_dir() and not path.is_symlink())]
    target = dice.choice(folders) / dice.choice("abc")
    deed = dice.choice(("write", "write", "mkdir", "mkdir", "remove", "remove", "link", "symlink", "chmod", "replace"))
    there = os.path.lexists(target)
    if deed == "remove" and paths:
        gone = dice.choice(paths)
        shutil.rmtree(gone) if gone.is_dir() and not gone.is_symlink() else gone.unlink()
    elif deed == "replace" and there:
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        target.mkdir()  # an opaque directory, where one was below
    elif deed == "chmod" and paths:
        path = dice.choice(paths)
        if not path.is_symlink():
            path.chmod(dice.choice((0o700, 0o755, 0o750)))
    elif there:
        if target.is_file() and not target.is_symlink() and deed == "write":
            target.write_text(str(dice.random()))
    elif deed == "write":
        target.write_text(str(dice.random()))
    elif deed == "mkdir":
        target.mkdir()
    elif deed == "symlink":
        target.symlink_to("nowhere")
    elif deed == "link":
        files = [path for path in paths if path.is_file() and not path.is_symlink()]
        if files:
            os.link(dice.choice(files), target)
