"""The two halves of an image, tree and disk: the one that it did not come with is made once, when first needed, and kept.

    images/ID/made/disk/   half.json disk.qcow2 [vmlinuz initrd]
    images/ID/made/tree/   half.json rootfs/

Made aside and published by one rename below the image's directory, which is otherwise never written again; whoever
removes the image removes its halves with it.
"""

from __future__ import annotations

import json
from dataclasses import replace

from hvctl.errors import InvalidSpec
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import manifest


def complete(host: Host, image: Image) -> Image:
    """The image with the half that was made for it, if one was. Raises InvalidSpec when that is damaged."""
    call, made = host.shell.call, host.store.made(image.id)
    if image.disk is None and call(files.exists, made / "disk" / "half.json"):
        source = made / "disk" / "half.json"
        try:
            data = json.loads(call(files.read_file, source))
            image = manifest.with_disk(image, data, "made/disk")
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidSpec(f"{str(source)!r} is damaged: {error!r}", hint=f"remove {source.parent}") from error
    if not image.has_tree and call(files.exists, made / "tree" / "half.json"):
        image = replace(image, has_tree=True)
    return image
