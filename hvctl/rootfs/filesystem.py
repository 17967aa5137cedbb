"""Root disks made of trees: one ext4 file system without a partition table, as qcow2.

The programs that read the tree and write the file system are confined: a tree may be anybody's.
"""

from __future__ import annotations

import os
from pathlib import Path

from hvctl.hostside import files, sandbox
from hvctl.model import Disk
from hvctl.rootfs import rawdisk
from hvctl.rootfs.building import Building
from hvctl.rootfs.rawdisk import RawDisk
from hvctl.values import dataclass

KERNEL_ARGUMENTS = ("root=/dev/vda", "rw", "console=ttyS0", "quiet", "net.ifnames=0")
"""What boots such a disk. `net.ifnames=0`: the interface is eth0, as it is in a container."""


@dataclass(frozen=True, kw_only=True)
class Percent:
    """How much of the whole is done when each part of the work begins."""

    file_system: float
    disk: float
    digests: float


@dataclass(frozen=True, kw_only=True)
class Modules:
    """A kernel's modules that a tree does not have."""

    source: Path
    """`.../lib/modules/RELEASE`, of a tree that hvctl built."""
    target: str
    """Where they go, without a slash in front: `usr/lib/modules/RELEASE`."""


def make_disk(
    work: Building, tree: Path, target: Path, *, virtual_bytes: int, percent: Percent, modules: Modules | None = None
) -> Disk:
    """The file system of a tree, of this size, as a finished qcow2 file `target`; the tree stays as it is.

    Raises HostError for a full file system, InvalidSpec for a tree that cannot be put into one.
    """
    work.tell("making the file system", percent.file_system)
    raw = make_raw(work, tree, virtual_bytes=virtual_bytes, modules=modules)
    work.tell("making the disk", percent.disk)
    raw.convert(target)
    work.tell("computing digests", percent.digests)
    return Disk(artefact=work.artefact(target), format="qcow2", virtual_bytes=virtual_bytes)


def make_raw(work: Building, tree: Path, *, virtual_bytes: int, modules: Modules | None = None) -> RawDisk:
    """The file system of a tree, of this size, in the building's directory. Raises as `make_disk` does."""
    raw = RawDisk(work=work, subject=work.name, virtual_bytes=virtual_bytes)
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-e", "remount-ro"]
    # The file is sparse, so zeroing all inode tables now costs nothing; a guest would write them in the background
    # of its first boot, into its own layer.
    words += ["-E", "lazy_itable_init=0,lazy_journal_init=1,nodiscard", "-d", sandbox.place_input(0)]
    raw.run(*words, "--", rawdisk.NAME, f"{virtual_bytes // 1024}k", read_only=[tree])
    if modules is not None:
        entries = work.host.shell.call(files.list_tree, modules.source)
        lines = _format_commands(entries, sandbox.place_input(0), modules.target)
        raw.edit(lines, read_only=[modules.source], accepted="already exists")
    return raw


def _format_commands(entries: list[tuple[str, str]], source: str, target: str) -> list[str]:
    """What debugfs is to do: all directories, then everything else in its directory."""
    parts = target.split("/")
    lines = [f"mkdir /{'/'.join(parts[:count])}" for count in range(1, len(parts) + 1)]
    lines += [f"mkdir /{target}/{path}" for path, link in entries if link == "/"]
    here = None
    for path, link in entries:
        folder, name = os.path.split(path)
        if link == "/":
            continue
        if folder != here:
            lines.append(f"cd /{target}/{folder}")
            here = folder
        lines.append(f"symlink {name} {link}" if link else f"write {source}/{path} {name}")
    return lines
