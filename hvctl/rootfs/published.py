"""Published images: found by tag, read from their manifests.

A tag or identifier is checked against its pattern before it becomes part of a path.
"""

from __future__ import annotations

import re

from hvctl.errors import HostError, InvalidSpec, NotFound
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import manifest

_TAG = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check_tag(name: str) -> str:
    """The name, if an image may have it. Raises InvalidSpec."""
    if not _TAG.fullmatch(name) or ".." in name:
        raise InvalidSpec(
            f"{name!r} cannot be the name of an image", hint="use lower-case letters, digits, '.', '_' and '-'"
        )
    return name


def find_image(host: Host, name: str) -> Image | None:
    """The image that a tag names, or None. Raises HostError when it is there but vanished or damaged."""
    check_tag(name)
    tag = host.store.tags / name
    if not host.shell.call(files.exists, tag):
        return None
    return read(host, host.read_text(tag).strip(), name)


def get_image(host: Host, name: str) -> Image:
    """The image that a tag names. Raises NotFound with the command that makes it."""
    image = find_image(host, name)
    if image is None:
        raise NotFound(f"there is no image {name!r}", hint=f"make it: hvctl image build {name}")
    return image


def list_images(host: Host) -> tuple[Image, ...]:
    """All tagged images by name."""
    names = [name for name in host.shell.call(files.list_names, host.store.tags) if _TAG.fullmatch(name)]
    return tuple(image for name in names if (image := find_image(host, name)) is not None)


def read(host: Host, image_id: str, name: str) -> Image:
    """The image of this identifier, all its files present. Raises HostError when something of it is gone."""
    if not _ID.fullmatch(image_id):
        raise HostError(f"the tag of image {name!r} is damaged", hint=f"build it again: hvctl image build {name}")
    folder = host.store.image(image_id)
    if not host.shell.call(files.exists, folder / "manifest.json"):
        raise HostError(
            f"image {name!r} has vanished from {str(folder)!r}", hint=f"build it again: hvctl image build {name}"
        )
    image = manifest.parse(host.read_text(folder / "manifest.json").encode(), str(folder / "manifest.json"))
    parts = [image.disk.artefact if image.disk else None, image.kernel, image.initrd]
    for artefact in parts:
        if artefact is not None and not host.shell.call(files.exists, folder / artefact.file):
            raise HostError(
                f"image {name!r} has lost its file {artefact.file!r}", hint=f"build it again: hvctl image build {name}"
            )
    return image
