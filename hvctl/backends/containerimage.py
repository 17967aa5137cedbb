"""What `image publish` does with a container: its layers on the image's tree made one tree, owners as they are inside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hvctl.hostside import files, flatten, identityfiles, layers
from hvctl.model import Image, Record
from hvctl.rootfs import archives
from hvctl.rootfs.building import Building, check_space
from hvctl.units import GIB

_COPY_TIMEOUT_S = 7200


def export_root(work: Building, record: Record, image: Image, top: Path, *, keep_identity: bool) -> Image:
    """The image that a container has become: a tree."""
    host, call = work.host, work.host.shell.call
    tree = host.store.image_tree(image.id)
    check_space(host, f"publishing {record.name!r}", 2 * call(files.disk_usage, tree) + GIB // 4)
    stack = [*(host.store.layer(layer) for layer in record.layers[:-1]), top]
    lowers = [(tree, 0), *((layer / "upper", call(layers.read_facts, layer).first_id) for layer in stack)]
    for folder in (work.rootfs.parent, work.rootfs):
        call(files.make_directory, folder, 0o700)
    work.tell("copying the tree", 10)
    host.shell.run(flatten.command(work.directory, lowers, work.rootfs), timeout_s=_COPY_TIMEOUT_S)
    if not keep_identity:
        work.tell("removing its identity", 60)
        call(identityfiles.remove, work.rootfs)
    work.tell("computing digests", 70)
    return replace(
        image,
        disk=None,
        kernel=None,
        initrd=None,
        kernel_arguments=(),
        kernel_release="",
        has_tree=True,
        tree_digest=f"sha256:{archives.hash_tree(host, work.rootfs)}",
    )
