"""What the root of an instance that is off shows, file by file, and changing it as its system would."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hvctl.host import Host
from hvctl.hostside import flatten, layers, roots
from hvctl.model import Mode, Record

Facts = tuple[object, ...]


def look(host: Host, record: Record, stack: tuple[str, ...] = ()) -> dict[str, Facts]:
    """Every path with kind, mode, owner, whole seconds, attributes, content and how many names it has, owners as inside."""
    with _shown(host, record, stack or record.layers) as root:
        found: dict[str, Facts] = {}
        for folder, folders, names in os.walk(root):
            for entry in (Path(folder, name) for name in (*folders, *names)):
                found[str(entry.relative_to(root))] = _describe(entry)
    own = ("lost+found", "sys", "sys/fs", "sys/fs/cgroup")  # a file system's; an overlay's
    return {path: facts for path, facts in found.items() if path not in own}


def change(host: Host, record: Record, deed: Callable[[Path, int], None]) -> None:
    """Let `deed` change the root of an instance that is off; it gets where that is, and what is to be added to owners."""
    if record.mode is Mode.VM:
        _change_disk(host, record, deed)
        return
    root = roots.Root(host.store, str(record.uuid), record.image_id, record.layers, record.first_id or 0)
    roots.mount(root)
    try:
        deed(host.store.container_root(record.uuid), root.first_id)
    finally:
        roots.unmount(root.directory)


def _change_disk(host: Host, record: Record, deed: Callable[[Path, int], None]) -> None:
    """Through this kernel, on a raw copy that then is the top layer."""
    disk = host.store.layer_disk(record.layers[-1])
    *_rest, base = (host.store.image(record.image_id) / "disk.qcow2", *map(host.store.layer_disk, record.layers[:-1]))
    with tempfile.TemporaryDirectory() as folder:
        raw, root = Path(folder, "raw"), Path(folder, "root")
        root.mkdir()
        _run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw))
        _run("mount", "-o", "loop", str(raw), str(root))
        try:
            deed(root, 0)
        finally:
            _run("umount", str(root))
        words = ["-f", "raw", "-O", "qcow2", "-B", str(base), "-F", "qcow2"]
        _run("qemu-img", "convert", *words, str(raw), str(disk))
        disk.chmod(0o600)


@contextmanager
def _shown(host: Host, record: Record, stack: tuple[str, ...]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        root = folder / "root"
        root.mkdir()
        if record.mode is Mode.VM:
            _run(
                "qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(host.store.layer_disk(stack[-1])), text + "/raw"
            )
            _run("e2fsck", "-fn", text + "/raw")
            _run("mount", "-o", "loop,ro", text + "/raw", str(root))
            try:
                yield root
            finally:
                _run("umount", str(root))
            return
        lowers = [(host.store.image_tree(record.image_id), 0)]
        lowers += [
            (host.store.layer_upper(layer), layers.read_facts(host.store.layer(layer)).first_id) for layer in stack
        ]
        _run(*flatten.command(folder, lowers, root))
        yield root


def _describe(path: Path) -> Facts:
    facts = path.lstat()
    content: object = ""
    if stat.S_ISREG(facts.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    elif stat.S_ISLNK(facts.st_mode):
        content = os.readlink(path)
    names = sorted(os.listxattr(path, follow_symlinks=False))
    attributes = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
    count = 0 if stat.S_ISDIR(facts.st_mode) else facts.st_nlink
    return (facts.st_mode, facts.st_uid, facts.st_gid, int(facts.st_mtime), attributes, content, count)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=120)
