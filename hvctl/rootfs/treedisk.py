"""The disk of an image that came as a tree: its file system, and a kernel that is known to boot it.

A tree that hvctl built has its kernel, initrd and modules in it. Any other gets those of the image that the settings
name (`image`), which hvctl built: containers' trees have none, and a foreign initrd looks for another disk.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from hvctl.errors import InvalidSpec
from hvctl.events import Note
from hvctl.host import Host
from hvctl.hostside import files, inroot
from hvctl.model import Image
from hvctl.rootfs import donor, filesystem, intake, manifest
from hvctl.rootfs.building import Building, check_space
from hvctl.rootfs.filesystem import KERNEL_ARGUMENTS
from hvctl.rootfs.request import DEFAULT_DISK_BYTES
from hvctl.units import GIB, MIB
from hvctl.values import dataclass

RELEASE = re.compile(r"[0-9][A-Za-z0-9._+~-]{0,63}", re.ASCII)
"""The release of a kernel, as it stands in the names of its files."""

_PERCENT = filesystem.Percent(file_system=5, disk=55, digests=85)
_OWN_KERNEL = "usr/lib/hvctl/kernel"
_INITS = ("sbin/init", "usr/sbin/init", "lib/systemd/systemd", "usr/lib/systemd/systemd")
_FOREIGN_ARGUMENTS = ("fstab=no",)  # its fstab, if any, is about the disk that it came from
_BOOT_FILE_LIMIT_BYTES = 256 * MIB
# Inodes are made for files of 16 KiB; trees have smaller ones.
_ROOM = 4


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a disk without a boot loader is booted by."""

    release: str
    arguments: tuple[str, ...]
    origin: str
    """For people: `image debian-12`, or where it is the tree's own, `the tree`."""
    lender: Image | None = None
    """The image that lends it; None: it is in the tree."""


def make(work: Building, image: Image, aside: Path) -> bytes:
    """Make disk, kernel and initrd in `aside`; what half.json says of them.

    Raises InvalidSpec for a tree without an init, NotFound when no image has a kernel to give.
    """
    host, call = work.host, work.host.shell.call
    tree = host.store.image_tree(image.id)
    kernel = choose_kernel(host, image, tree)
    used_bytes = call(files.disk_usage, tree)
    check_space(host, f"making the disk of {image.name!r}", 2 * used_bytes + GIB // 4)
    if kernel.lender is not None:
        work.events(Note(image.name, f"a VM of it gets the kernel {kernel.release} of {kernel.origin}"))
    disk = filesystem.make_disk(
        work,
        tree,
        aside / "disk.qcow2",
        virtual_bytes=max(DEFAULT_DISK_BYTES, choose_size(used_bytes)),
        percent=_PERCENT,
        modules=find_missing_modules(host, tree, kernel),
    )
    place_boot_files(host, tree, kernel, aside)
    finished = replace(
        image,
        disk=disk,
        kernel=work.artefact(aside / "vmlinuz"),
        initrd=work.artefact(aside / "initrd"),
        kernel_arguments=kernel.arguments,
        kernel_release=kernel.release,
    )
    data = {**json.loads(manifest.format_disk(finished)), "made_from": "tree", "kernel_from": kernel.origin}
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def choose_size(used_bytes: int) -> int:
    """Bytes of a disk with room for a tree that takes this much."""
    return -(-_ROOM * used_bytes // GIB) * GIB


def choose_kernel(host: Host, image: Image, tree: Path) -> Kernel:
    """What boots a tree, of this image or of what has become of it.

    Raises InvalidSpec for a tree without an init, NotFound when no image has a kernel to give.
    """
    if not host.shell.call(inroot.find, tree, _INITS):
        raise InvalidSpec(
            f"the tree of image {image.name!r} has no {_INITS[0]}, so it cannot run as a VM",
            hint="see what it is: hvctl image show",
        )
    return _find_own(host, tree) or _borrow(host, image)


def _find_own(host: Host, tree: Path) -> Kernel | None:
    """The newest kernel in a tree that hvctl built, its initrd one that boots there."""
    call = host.shell.call
    if not call(inroot.find, tree, [_OWN_KERNEL]):
        return None
    names = call(inroot.list_names, tree, "boot")
    releases = [release for name in names if RELEASE.fullmatch(release := name.removeprefix("vmlinuz-"))]
    whole = [
        release
        for release in releases
        if f"initrd.img-{release}" in names and call(inroot.find, tree, _module_places(release))
    ]
    if not whole:
        return None
    newest = max(whole, key=lambda release: [int(part) for part in re.findall("[0-9]+", release)])
    return Kernel(release=newest, arguments=KERNEL_ARGUMENTS, origin="the tree")


def _borrow(host: Host, image: Image) -> Kernel:
    lender = donor.get(host, image.name)
    arguments = (*lender.kernel_arguments, *_FOREIGN_ARGUMENTS)
    return Kernel(release=lender.kernel_release, arguments=arguments, origin=f"image {lender.name}", lender=lender)


def find_missing_modules(host: Host, tree: Path, kernel: Kernel) -> filesystem.Modules | None:
    """The modules of a borrowed kernel, where the tree does not have them."""
    call, places = host.shell.call, _module_places(kernel.release)
    if kernel.lender is None or call(inroot.find, tree, places):
        return None
    source = host.store.image_tree(kernel.lender.id)
    has_merged_usr = call(files.is_link, tree / "lib")
    return filesystem.Modules(source=source / places[0], target=places[0] if has_merged_usr else places[1])


def place_boot_files(host: Host, tree: Path, kernel: Kernel, aside: Path) -> None:
    """Copy kernel and initrd into a directory, as `vmlinuz` and `initrd`."""
    call = host.shell.call
    if kernel.lender is not None:
        assert kernel.lender.kernel and kernel.lender.initrd
        for artefact, target in ((kernel.lender.kernel, "vmlinuz"), (kernel.lender.initrd, "initrd")):
            call(files.clone_file, host.store.image(kernel.lender.id) / artefact.file, aside / target, 0o444)
        return
    for source, target in ((f"vmlinuz-{kernel.release}", "vmlinuz"), (f"initrd.img-{kernel.release}", "initrd")):
        content = intake.read_in_tree(host, tree, f"boot/{source}", limit_bytes=_BOOT_FILE_LIMIT_BYTES)
        call(files.write_file, aside / target, content or b"", 0o444)


def _module_places(release: str) -> list[str]:
    return [f"usr/lib/modules/{release}", f"lib/modules/{release}"]
