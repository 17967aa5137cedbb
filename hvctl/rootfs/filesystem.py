"""Root disks made of trees: one ext4 file system without a partition table, as qcow2.

The programs that read the tree and write the file system are confined: a tree may be anybody's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from hvctl.errors import HostError
from hvctl.hostside import files, sandbox
from hvctl.model import Disk
from hvctl.rootfs import confined
from hvctl.rootfs.building import Building
from hvctl.units import GIB

KERNEL_ARGUMENTS = ("root=/dev/vda", "rw", "console=ttyS0", "quiet", "net.ifnames=0")
"""What boots such a disk. `net.ifnames=0`: the interface is eth0, as it is in a container."""
_RAW = "disk.raw"
_COMMANDS = "debugfs.commands"


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
    limits = replace(confined.DEFAULTS, file_bytes=virtual_bytes + GIB)
    work.tell("making the file system", percent.file_system)
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-e", "remount-ro"]
    # The file is sparse, so zeroing all inode tables now costs nothing; a guest would write them in the background
    # of its first boot, into its own layer.
    words += ["-E", "lazy_itable_init=0,lazy_journal_init=1,nodiscard", "-d", sandbox.place_input(0)]
    words += ["--", _RAW, f"{virtual_bytes // 1024}k"]
    capabilities = sandbox.READ_ANY_OWNER
    confined.run_confined(work.host, work.directory, words, read_only=[tree], capabilities=capabilities, limits=limits)
    if modules is not None:
        _add_modules(work, modules, limits)
    work.tell("making the disk", percent.disk)
    raw = work.directory / _RAW
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "--", sandbox.place_input(0), "disk.qcow2"]
    confined.run_confined(work.host, work.directory, convert, read_only=[raw], limits=limits)
    work.host.shell.call(files.remove, raw)
    work.host.shell.call(files.replace_if_there, work.directory / "disk.qcow2", target)
    work.tell("computing digests", percent.digests)
    return Disk(artefact=work.artefact(target), format="qcow2", virtual_bytes=virtual_bytes)


def _add_modules(work: Building, modules: Modules, limits: confined.Limits) -> None:
    """Written into the file system by debugfs, which follows no link out of it; then looked at by e2fsck."""
    call, host = work.host.shell.call, work.host
    commands = _format_commands(call(files.list_tree, modules.source), sandbox.place_input(0), modules.target)
    call(files.write_file, work.directory / _COMMANDS, commands.encode(), 0o600)
    words = ["debugfs", "-w", "-f", _COMMANDS, _RAW]
    read_only, capabilities = [modules.source], sandbox.READ_ANY_OWNER
    done = confined.run_confined(
        host, work.directory, words, read_only=read_only, capabilities=capabilities, limits=limits
    )
    # debugfs ends with 0 whatever happened; a directory that is there already is fine.
    complaints = [
        line
        for line in done.stderr.splitlines()
        if line.strip() and not line.startswith("debugfs ") and "already exists" not in line
    ]
    check = confined.run_confined(host, work.directory, ["e2fsck", "-fn", "--", _RAW], limits=limits, check=False)
    if complaints or check.status != 0:
        reason = complaints[0] if complaints else f"e2fsck ended with {check.status}"
        raise HostError(
            f"cannot put the kernel's modules into the disk of {work.name!r}: {reason[:200]}",
            hint="free some space: see `hvctl host doctor`",
        )


def _format_commands(entries: list[tuple[str, str]], source: str, target: str) -> str:
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
    return "\n".join(lines) + "\n"
