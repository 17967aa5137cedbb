"""The tree of an image that came as a disk: its Linux root is found and read without the kernel's file system code.

The disk is copied to a raw file, in which a confined worker looks for partitions and file systems
(`hostside/diskreader.py`) and writes the root as a tar stream; that is unpacked like any archive from outside. Only
ext2, ext3 and ext4 can be read so. Where the user trusts the disk, this kernel mounts what else it knows, read-only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from hvctl.errors import CommandFailed, InvalidSpec, Unsupported
from hvctl.events import Note
from hvctl.hostside import files, partitions, sandbox
from hvctl.hostside.partitions import Part
from hvctl.model import Image
from hvctl.rootfs import confined, intake
from hvctl.rootfs.building import Building, check_space
from hvctl.shell import Completed
from hvctl.units import GIB

_RAW, _ARCHIVE = "disk.raw", "tree.tar"
_E2FSCK_MENDED = (0, 1)
_MOUNT_TIMEOUT_S = 3600
# Where the root may be below the top of a file system: btrfs's subvolumes of Fedora and openSUSE.
_MOUNT_AND_PACK = """
set -eu
mkdir -p "$2"
mount -t "$3" -o "ro,nodev,nosuid,noexec,loop,$4" -- "$1" "$2"
for below in . root @ @rootfs; do
    if [ -e "$2/$below/etc/os-release" ] || [ -L "$2/$below/etc/os-release" ]; then
        tar -C "$2/$below" --one-file-system --xattrs --xattrs-include='*' --numeric-owner --sparse -cf "$5" .
        exit
    fi
done
echo 'no Linux root is in it' >&2
exit 1
"""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A disk that is being read."""

    work: Building
    image: Image
    virtual_bytes: int

    @property
    def limits(self) -> confined.Limits:
        return replace(confined.DEFAULTS, file_bytes=self.virtual_bytes + GIB)


def make(work: Building, image: Image, aside: Path, *, is_trusted: bool) -> bytes:
    """Make the tree in `aside`; what half.json says of it.

    Raises InvalidSpec for a disk without a Linux root or a damaged one, Unsupported for a file system that only a
    kernel can read.
    """
    assert image.disk is not None
    host = work.host
    reading = _Reading(work=work, image=image, virtual_bytes=image.disk.virtual_bytes)
    check_space(host, f"making the tree of {image.name!r}", 3 * image.disk.artefact.size_bytes + GIB // 4)
    work.tell("copying the disk", 5)
    _copy_raw(reading)
    work.tell("looking for its root", 25)
    root = _get_root(reading)
    work.tell("reading its root", 35)
    reader = _pack(reading, root, is_trusted=is_trusted)
    host.shell.call(files.remove, work.directory / _RAW)
    work.tell("unpacking its root", 60)
    intake.unpack_tree(host, work.directory / _ARCHIVE, aside / "rootfs", subject=image.name)
    host.shell.call(files.remove, work.directory / _ARCHIVE)
    data = {"schema": 1, "made_from": "disk", "offset": root.offset, "file_system": root.kind, "read_by": reader}
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def _copy_raw(reading: _Reading) -> None:
    assert reading.image.disk is not None
    host, disk = reading.work.host, reading.image.disk
    source = host.store.image(reading.image.id) / disk.artefact.file
    words = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", "--", sandbox.place_input(0), _RAW]
    confined.run_confined(host, reading.work.directory, words, read_only=[source], limits=reading.limits)


def _get_root(reading: _Reading) -> Part:
    """The root's place on the disk, its journal replayed. Raises InvalidSpec when there is none."""
    parts = _survey(reading)
    for part in parts:
        if part.needs_recovery:
            words = ["e2fsck", "-fy", f"{_RAW}?offset={part.offset}"]
            done = confined.run_confined(
                reading.work.host, reading.work.directory, words, limits=reading.limits, check=False
            )
            if done.status not in _E2FSCK_MENDED:
                reading.work.events(Note(reading.image.name, f"e2fsck could not mend the file system at {part.offset}"))
    root = partitions.choose_root(_survey(reading) if any(part.needs_recovery for part in parts) else parts)
    if root is None:
        found = ", ".join(part.problem or part.kind or "unknown" for part in parts) or "nothing"
        raise InvalidSpec(
            f"image {reading.image.name!r} cannot run as a container: no Linux root is on its disk (found: {found[:200]})",
            hint="start it as a VM",
        )
    return root


def _survey(reading: _Reading) -> list[Part]:
    done = _run_reader(reading, "survey", _RAW)
    try:
        return [Part(**part) for part in json.loads(done.stdout)]
    except (TypeError, ValueError) as error:
        raise InvalidSpec(f"the disk of image {reading.image.name!r} cannot be read", hint="get it again") from error


def _pack(reading: _Reading, root: Part, *, is_trusted: bool) -> str:
    """Write the root as an archive; what has read it."""
    if root.is_root:
        _run_reader(reading, "pack", _RAW, str(root.offset), str(root.size), _ARCHIVE)
        return "hvctl"
    name = reading.image.name
    if not is_trusted:
        raise Unsupported(
            f"image {name!r} has its root on {root.kind}"
            f"{f' ({root.problem})' if root.problem else ''}, which only this host's kernel could read",
            hint=f"start it as a VM; or, if you trust who made it: hvctl create ... --image {name} --trust-image",
        )
    options = [f"offset={root.offset}", f"sizelimit={root.size}", *(["norecovery"] if root.kind == "xfs" else [])]
    directory = reading.work.directory
    words = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _MOUNT_AND_PACK, "sh"]
    paths = [str(directory / _RAW), str(directory / "mounted"), root.kind, ",".join(options), str(directory / _ARCHIVE)]
    try:
        reading.work.host.shell.run([*words, *paths], timeout_s=_MOUNT_TIMEOUT_S)
    except CommandFailed as error:
        error.message = f"cannot read the {root.kind} file system of image {name!r}: {error.message}"
        raise
    return "kernel"


def _run_reader(reading: _Reading, *arguments: str) -> Completed:
    limits = reading.limits
    confinement = sandbox.Confinement(
        directory=reading.work.directory,
        cpu_s=limits.cpu_s,
        memory_bytes=limits.memory_bytes,
        file_bytes=limits.file_bytes,
    )
    words = sandbox.python_command(confinement, "diskreader", arguments)
    done = reading.work.host.shell.run(words, timeout_s=limits.wall_s, check=False)
    if done.status != 0:
        raise confined.explain(done, f"cannot read the disk of image {reading.image.name!r}", limits)
    return done
