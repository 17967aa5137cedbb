"""The tree of an image that came as a disk: its Linux root is found and read without the kernel's file system code.

The disk is copied to a raw file, in which a confined worker looks for partitions and file systems
(`hostside/diskreader.py`) and writes the root as a tar stream; that is unpacked like any archive from outside. Only
ext2, ext3 and ext4 can be read so. Where the user trusts the disk, this kernel mounts what else it knows, read-only.
"""

from __future__ import annotations

import json
from pathlib import Path

from hvctl.errors import CommandFailed, InvalidSpec, Unsupported
from hvctl.hostside import files, sandbox
from hvctl.hostside.partitions import Part
from hvctl.model import Image
from hvctl.rootfs import intake, rawdisk
from hvctl.rootfs.building import Building, check_space
from hvctl.rootfs.rawdisk import RawDisk
from hvctl.units import GIB

_ARCHIVE = "tree.tar"
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


def make(work: Building, image: Image, aside: Path, *, is_trusted: bool) -> bytes:
    """Make the tree in `aside`; what half.json says of it.

    Raises InvalidSpec for a disk without a Linux root or a damaged one, Unsupported for a file system that only a
    kernel can read.
    """
    assert image.disk is not None
    host, disk = work.host, image.disk
    check_space(host, f"making the tree of {image.name!r}", 3 * disk.artefact.size_bytes + GIB // 4)
    raw = RawDisk(work=work, subject=image.name, virtual_bytes=disk.virtual_bytes)
    work.tell("copying the disk", 5)
    source = host.store.image(image.id) / disk.artefact.file
    words = ("qemu-img", "convert", "-p", "-f", disk.format, "-O", "raw", "--", sandbox.place_input(0), rawdisk.NAME)
    raw.run(*words, read_only=[source], task="copying the disk")
    work.tell("looking for its root", 25)
    root, parts = raw.find_root()
    if root is None:
        found = ", ".join(part.problem or part.kind or "unknown" for part in parts)
        raise InvalidSpec(
            f"image {image.name!r} cannot run as a container: there is no Linux root on its disk (found: {found[:200]})",
            hint="start it as a VM",
        )
    work.tell("reading its root", 35)
    reader = "hvctl" if root.is_root else "kernel"
    if root.is_root:
        raw.pack(root, _ARCHIVE)
    else:
        _check_trusted(image, root, is_trusted=is_trusted)
        _mount_and_pack(raw, root)
    host.shell.call(files.remove, raw.path)
    work.tell("unpacking its root", 60)
    intake.unpack_tree(host, work.directory / _ARCHIVE, aside / "rootfs", subject=image.name)
    host.shell.call(files.remove, work.directory / _ARCHIVE)
    data = {"schema": 1, "made_from": "disk", "offset": root.offset, "file_system": root.kind, "read_by": reader}
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def _check_trusted(image: Image, root: Part, *, is_trusted: bool) -> None:
    if not is_trusted:
        problem = f" ({root.problem})" if root.problem else ""
        raise Unsupported(
            f"image {image.name!r} has its root on {root.kind}{problem}, which only this host's kernel could read",
            hint=f"start it as a VM; or, if you trust who made it: hvctl create ... --image {image.name} --trust-image",
        )


def _mount_and_pack(raw: RawDisk, root: Part) -> None:
    options = [f"offset={root.offset}", f"sizelimit={root.size}", *(["norecovery"] if root.kind == "xfs" else [])]
    words = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _MOUNT_AND_PACK, "sh"]
    directory = raw.work.directory
    paths = [str(raw.path), str(directory / "mounted"), root.kind, ",".join(options), str(directory / _ARCHIVE)]
    try:
        raw.work.host.shell.run([*words, *paths], timeout_s=_MOUNT_TIMEOUT_S)
    except CommandFailed as error:
        error.message = f"cannot read the {root.kind} file system of image {raw.subject!r}: {error.message}"
        raise
