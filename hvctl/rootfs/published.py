"""Published images: found by tag, read from their manifests.

A tag or identifier is checked against its pattern before it becomes part of a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hvctl.errors import HostError, InvalidSpec, NotFound
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import halves, manifest

_TAG = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LOCK_TIMEOUT_S = 60


def check_tag(name: str) -> str:
    """The name, if an image may have it. Raises InvalidSpec."""
    if not _TAG.fullmatch(name) or ".." in name:
        raise InvalidSpec(
            f"{name[:80]!r} cannot be the name of an image",
            hint="use 1 to 63 lower-case letters, digits, '.', '_' and '-'",
        )
    return name


def get_image(host: Host, name: str) -> Image:
    """The image that a tag names. Raises NotFound with the command that makes it."""
    image = find_image(host, name)
    if image is None:
        raise NotFound(f"there is no image {name!r}", hint=f"make it: hvctl image build {name}")
    return image


def find_image(host: Host, name: str) -> Image | None:
    """The image that a tag names, or None. Raises HostError when it is there but vanished or damaged."""
    image_id = find_id(host, name)
    return None if image_id is None else read(host, image_id, name)


def list_images(host: Host) -> tuple[Image, ...]:
    """All tagged images by name. Raises HostError when one of them vanished or is damaged."""
    return tuple(image for name in list_tags(host) if (image := find_image(host, name)) is not None)


def list_tags(host: Host) -> tuple[str, ...]:
    """The names that images have, sorted."""
    return tuple(name for name in host.shell.call(files.list_names, host.store.tags) if _TAG.fullmatch(name))


def list_ids(host: Host) -> tuple[str, ...]:
    """The identifiers of all images in the store, those without a name too."""
    return tuple(name for name in host.shell.call(files.list_names, host.store.images) if _ID.fullmatch(name))


def find_id(host: Host, name: str) -> str | None:
    """The identifier that a tag names, or None; whether its image is there is not looked at."""
    tag = host.store.tags / check_tag(name)
    if not host.shell.call(files.exists, tag):
        return None
    image_id = host.read_text(tag).strip()
    if not _ID.fullmatch(image_id):
        raise HostError(f"the tag of image {name!r} is damaged", hint=f"build it again: hvctl image build {name}")
    return image_id


@contextmanager
def changing(host: Host) -> Iterator[None]:
    """Hold the one lock under which images and their names appear and go. No instance can have its name: the dot."""
    with host.lock("images.tags", timeout_s=_LOCK_TIMEOUT_S):
        yield


def publish(host: Host, aside: Path, image: Image) -> None:
    """Give a finished directory its place and the image its name; the same content is there once.

    The directory is not left behind, unless the content was there already.
    """
    call, final = host.shell.call, host.store.image(image.id)
    with changing(host):
        if not call(files.exists, final):
            call(files.publish, aside, final)
        call(files.write_file, host.store.tags / check_tag(image.name), f"{image.id}\n".encode(), 0o644)


def read(host: Host, image_id: str, name: str) -> Image:
    """The image of this identifier under this name, all its files present.

    Raises HostError when something of it is gone, InvalidSpec or Unsupported when its manifest cannot be used.
    """
    folder = host.store.image(image_id)
    mend = f"build it again: hvctl image build {name}"
    source = folder / "manifest.json"
    if not host.shell.call(files.exists, source):
        raise HostError(f"image {name!r} has vanished from {str(folder)!r}", hint=mend)
    image = manifest.parse(host.shell.call(files.read_file, source), str(source))
    if image.id != image_id:
        raise HostError(f"the directory {str(folder)!r} holds another image, {image.id[:12]}", hint=mend)
    parts = (image.disk.artefact if image.disk else None, image.kernel, image.initrd)
    for artefact in parts:
        if artefact is not None and not host.shell.call(files.exists, folder / artefact.file):
            raise HostError(f"image {name!r} has lost its file {artefact.file!r}", hint=mend)
    return halves.complete(host, replace(image, name=name))
