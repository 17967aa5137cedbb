"""The halves that were made for an image, as they lie in the store; `halves.py` makes them.

    images/ID/made/disk/   half.json disk.qcow2 [vmlinuz initrd]
    images/ID/made/tree/   half.json rootfs/

`half.json` describes a disk as `manifest.with_disk` takes it, and says of both how they were made.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hvctl.errors import InvalidSpec
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import manifest

DISK, TREE = "disk", "tree"


def complete(host: Host, image: Image) -> Image:
    """The image with the half that was made for it, if one was. Raises InvalidSpec when that is damaged."""
    if image.disk is None and host.shell.call(files.exists, description(host, image, DISK)):
        source = description(host, image, DISK)
        try:
            data = json.loads(host.shell.call(files.read_file, source))
            image = manifest.with_disk(image, data, f"made/{DISK}")
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidSpec(f"{str(source)!r} is damaged: {error!r}", hint=f"remove {source.parent}") from error
    if not image.has_tree and host.shell.call(files.exists, description(host, image, TREE)):
        image = replace(image, has_tree=True)
    return image


def list_made(host: Host, image_id: str) -> tuple[str, ...]:
    """Which halves were made for an image: `disk`, `tree`."""
    return tuple(
        half for half in (DISK, TREE) if host.shell.call(files.exists, host.store.made(image_id) / half / "half.json")
    )


def description(host: Host, image: Image, half: str) -> Path:
    """Where it is said how a half was made; there as soon as the half is."""
    return host.store.made(image.id) / half / "half.json"
