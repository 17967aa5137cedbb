"""Loop devices: a file of ours as a block device, for as long as somebody has it mounted or open.

The kernel takes the device away with its last user (LO_FLAGS_AUTOCLEAR, loop(4)), so nothing is left by a crash. One
file has one device, or two file systems would be written to the same blocks: where it has one already, that is used.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_CONTROL = Path("/dev/loop-control")
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A  # linux/loop.h
_AUTOCLEAR = 4
# struct loop_config: file, block size, then struct loop_info64, in which only the flags are not 0.
_CONFIG = struct.Struct("=II 5Q 3I I 160x 2Q 8Q")
_TRIES = 16


def open_loop(path: Path) -> tuple[int, Path]:
    """A descriptor that keeps the device of this file alive, and the device. Raises OSError where none can be had."""
    held = _open_existing(path)
    if held is not None:
        return held
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for _try in range(_TRIES):
            device = Path(f"/dev/loop{_find_free()}")
            loop = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(loop, _CONFIGURE, _CONFIG.pack(file, 0, *(0,) * 8, _AUTOCLEAR, *(0,) * 10))
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:  # somebody else was quicker
                    raise
                continue
            return loop, device
    finally:
        os.close(file)
    raise OSError(errno.EBUSY, "no loop device is free", os.fspath(path))


def find_loop(path: Path) -> Path | None:
    """The device that shows this file, or None."""
    for folder in Path("/sys/block").glob("loop*"):
        if _backing(folder) == os.fspath(path):
            return Path("/dev", folder.name)
    return None


def _find_free() -> int:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(control, _GET_FREE)
    finally:
        os.close(control)


def _open_existing(path: Path) -> tuple[int, Path] | None:
    device = find_loop(path)
    if device is None:
        return None
    loop = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    if _backing(Path("/sys/block", device.name)) == os.fspath(path):  # from here on it stays
        return loop, device
    os.close(loop)
    return None


def _backing(folder: Path) -> str:
    try:
        return (folder / "loop" / "backing_file").read_text().removesuffix("\n")
    except OSError:
        return ""
