"""A directory tree that comes back from a backup: what `hostside/transfer.py` has packed, unpacked confined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hvctl.errors import InvalidSpec
from hvctl.host import Host
from hvctl.hostside import files, marks
from hvctl.rootfs import confined, intake
from hvctl.units import MIB

# Beyond what `marks` takes into an archive.
_MOST_ENTRIES, _DEEPEST, _LONGEST_PATH = 50_000_000, 500, 4090
_MOST_BYTES = 2**44  # ext4's longest file; holes take no space


def unpack(host: Host, archive: Path, target: Path, name: str) -> None:
    """Unpack a directory of this name, whiteouts done, into a new one of ours (0700); the archive is used up.

    It may be as large as it is: its size was promised, checked, and there is space for it. Raises InvalidSpec for an
    archive that cannot be.
    """
    call = host.shell.call
    size_bytes = call(files.size, archive)
    limits = replace(
        confined.DEFAULTS,
        expanded_bytes=2**62,
        file_bytes=_MOST_BYTES,
        **dict.fromkeys(("cpu_s", "wall_s"), 3600 + size_bytes // (8 * MIB)),
        entries=_MOST_ENTRIES,
        depth=_DEEPEST,
        path_bytes=_LONGEST_PATH,
    )
    intake.unpack_tree(host, archive, target, limits=limits, subject="the backup")
    call(files.remove, archive)
    if set(call(files.list_names, target)) != {name, marks.NAME} or not call(files.is_plain_directory, target / name):
        raise InvalidSpec("an archive of the backup is none of a directory", hint="restore another one")
    reason = call(marks.apply, target / name)
    if reason:
        raise InvalidSpec(f"an archive of the backup says what cannot be: {reason}", hint="restore another one")
    call(files.set_mode, target, 0o700)
