"""Writing into the roots of instances that are off, and reading what a stack of layers shows; without hvctl's own code.

A root has SLOTS slots, each a number from 0 (nothing) to 255. A VM's slots are clusters of its disk, written and read
by qemu; a container's are files, written into its upper directory as an overlay would, read through the kernel's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hvctl.host import Host
from hvctl.model import Mode, Record
from hvctl.store import Store
from tests import layereddisk

SLOTS = 8
SLOT_BYTES = 64 * 1024
Content = tuple[int, ...]
EMPTY: Content = (0,) * SLOTS
_libc = ctypes.CDLL(None, use_errno=True)


def write(host: Host, record: Record, slot: int, value: int, *, offset_bytes: int = 0) -> None:
    """Write into the top of an instance that is off; `offset_bytes`: where on a VM's disk its slots begin."""
    if record.mode is Mode.VM:
        disk = host.store.layer_disk(record.layers[-1])
        command = f"write -P {value} {offset_bytes + slot * SLOT_BYTES} {SLOT_BYTES}"
        words = ["qemu-io", "-f", "qcow2", "-c", command, str(disk)]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        return
    path = host.store.layer(record.layers[-1]) / "upper" / f"slot{slot}"
    path.unlink(missing_ok=True)
    if value:
        path.write_text(str(value))
        os.chown(path, record.first_id or 0, record.first_id or 0)
    else:
        os.mknod(path, 0o20000, os.makedev(0, 0))


def write_file(host: Host, record: Record, slot: int, value: int) -> None:
    """As `write`, into a VM's file system instead of its disk."""
    if record.mode is not Mode.VM:
        write(host, record, slot, value)
        return
    disk = host.store.layer_disk(record.layers[-1])
    with tempfile.TemporaryDirectory() as folder:
        before, after, content = (Path(folder, name) for name in ("before", "after", "content"))
        words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(before)]
        subprocess.run(words, check=True, timeout=60)
        shutil.copy(before, after)
        content.write_text(str(value))
        for command in (f"rm slot{slot}", *([f"write {content} slot{slot}"] if value else [])):
            subprocess.run(["debugfs", "-w", "-R", command, str(after)], check=True, capture_output=True, timeout=60)
        layereddisk.to_layer(before, after, disk)


def read(host: Host, record: Record, stack: tuple[str, ...]) -> Content:
    """What a stack of layers (lowest first; none: the image) shows."""
    if record.mode is Mode.VM:
        disk = host.store.layer_disk(stack[-1]) if stack else host.store.image(record.image_id) / "disk.qcow2"
        return read_disk(disk)
    return _read_overlay(host.store, record.image_id, stack)


def read_disk(disk: Path) -> Content:
    with tempfile.NamedTemporaryFile() as raw:
        words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), raw.name]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        found = []
        for slot in range(SLOTS):
            raw.seek(slot * SLOT_BYTES)
            content = raw.read(SLOT_BYTES).ljust(SLOT_BYTES, b"\0")
            assert len(set(content)) == 1
            found.append(content[0])
    return tuple(found)


def _read_overlay(store: Store, image_id: str, stack: tuple[str, ...]) -> Content:
    lowers = [store.image_tree(image_id), *(store.layer(layer) / "upper" for layer in stack)]
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, lower in enumerate(lowers):
            (Path(folder) / str(number)).symlink_to(lower)
            names.insert(0, str(number))
        target = Path(folder) / "root"
        target.mkdir()
        here = os.getcwd()
        os.chdir(folder)
        try:
            options = f"lowerdir={':'.join(names)}" if len(names) > 1 else "lowerdir=0:0"
            if len(names) == 1:
                return _read_files(lowers[0])
            assert _libc.mount(b"overlay", os.fsencode(target), b"overlay", 1, options.encode()) == 0, os.strerror(
                ctypes.get_errno()
            )
            try:
                return _read_files(target)
            finally:
                _libc.umount2(os.fsencode(target), 2)
        finally:
            os.chdir(here)


def _read_files(root: Path) -> Content:
    paths = [root / f"slot{slot}" for slot in range(SLOTS)]
    return tuple(int(path.read_text()) if path.exists() else 0 for path in paths)
