"""The disk of an application image, and what boots it: the kernel of an image that hvctl built, an initrd of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hvctl.events import Note
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import appinitrd, donor, filesystem, manifest
from hvctl.rootfs.building import Building, check_space
from hvctl.rootfs.request import DEFAULT_DISK_BYTES
from hvctl.units import GIB

_PERCENT = filesystem.Percent(file_system=5, disk=55, digests=85)
# Inodes are made for files of 16 KiB; trees have smaller ones.
_ROOM = 4


def make(work: Building, image: Image, aside: Path) -> bytes:
    """Make disk, kernel and initrd in `aside`; what half.json says of them.

    Raises NotFound or Unsupported when no image has a kernel to give, HostError for a full store.
    """
    host, call = work.host, work.host.shell.call
    lender = donor.get(host, image.name)
    assert lender.kernel is not None
    tree = host.store.image_tree(image.id)
    used_bytes = call(files.disk_usage, tree)
    check_space(host, f"making the disk of {image.name!r}", 2 * used_bytes + GIB // 4)
    work.events(Note(image.name, f"a VM of it gets the kernel {lender.kernel_release} of image {lender.name}"))
    disk = filesystem.make_disk(
        work,
        tree,
        aside / "disk.qcow2",
        virtual_bytes=max(DEFAULT_DISK_BYTES, -(-_ROOM * used_bytes // GIB) * GIB),
        percent=_PERCENT,
    )
    call(files.clone_file, host.store.image(lender.id) / lender.kernel.file, aside / "vmlinuz", 0o444)
    modules = host.store.image_tree(lender.id) / "usr/lib/modules" / lender.kernel_release
    call(files.write_file, aside / "initrd", appinitrd.make(host, modules), 0o444)
    finished = replace(
        image,
        disk=disk,
        kernel=work.artefact(aside / "vmlinuz"),
        initrd=work.artefact(aside / "initrd"),
        kernel_arguments=appinitrd.KERNEL_ARGUMENTS,
        kernel_release=lender.kernel_release,
    )
    data = {
        **json.loads(manifest.format_disk(finished)),
        "made_from": "tree",
        "kernel_from": f"image {lender.name}",
    }
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"
