"""Published images: found by tag, read from their manifests.

A tag or identifier is checked against its pattern before it becomes part of a path.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hvctl.errors import HostError, HvctlError, InvalidSpec, NotFound
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import made, manifest

_TAG = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)
_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PRINTABLE = re.compile(r"[!-~]{1,200}", re.ASCII)
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
        raise NotFound(f"there is no image {name!r}", hint=_hint_for(name))
    return image


def _hint_for(name: str) -> str:
    """The command that makes an image of this name, where one can."""
    from hvctl.rootfs import catalogue, request  # both need this module

    if request.is_buildable(name):
        return f"make it: hvctl image build {name}"
    with contextlib.suppress(HvctlError):  # a catalogue of the user's that makes no sense is not what this is about
        if catalogue.find(name):
            return f"bring it: hvctl image pull {name}"
    return "see which there are: hvctl image list; which there could be: hvctl image catalogue"


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
    _check_no_source(name)
    tag = host.store.tags / check_tag(name)
    if not host.shell.call(files.exists, tag):
        return None
    image_id = host.read_text(tag).strip()
    if not _ID.fullmatch(image_id):
        raise HostError(f"the tag of image {name!r} is damaged", hint=f"build it again: hvctl image build {name}")
    return image_id


def _check_no_source(text: str) -> None:
    """Raise InvalidSpec, with the command that brings it here, for a place that images come from."""
    is_file = text.startswith("/")
    if not _PRINTABLE.fullmatch(text) or not (is_file or ":" in text):
        return
    from hvctl.rootfs import sources  # it needs this module

    if is_file or sources.is_source(text):
        named = "" if text.startswith("images:") else f" --name {sources.suggest_name(text)}"
        raise InvalidSpec(
            f"{text!r} cannot be the name of an image: it is where one may come from",
            hint=f"hvctl image {'import' if is_file else 'pull'} {shlex.quote(text)}{named}",
        )


@contextlib.contextmanager
def changing(host: Host) -> Iterator[None]:
    """Hold the one lock under which images and their names appear and go. No instance can have its name: the dot."""
    with host.lock("images.tags", timeout_s=_LOCK_TIMEOUT_S):
        yield


def publish(host: Host, aside: Path, image: Image) -> str:
    """Give a finished directory its place and the image its name; the same content is there once.

    The directory is not left behind, unless the content was there already. Gives what `give_name` does.
    """
    call, final = host.shell.call, host.store.image(image.id)
    with changing(host):
        if not call(files.exists, final):
            call(files.publish, aside, final)
        return _write_name(host, image)


def place(host: Host, aside: Path, image: Image) -> None:
    """Give a finished directory its place without a name: it stays as long as an instance stands on it."""
    with changing(host):
        if not host.shell.call(files.exists, host.store.image(image.id)):
            host.shell.call(files.publish, aside, host.store.image(image.id))


def give_name(host: Host, image: Image) -> str:
    """Give one more name to an image that is in the store; the identifier of another that had it, or an empty string.

    Raises NotFound when the image has gone meanwhile.
    """
    with changing(host):
        if not host.shell.call(files.exists, host.store.image(image.id)):
            raise NotFound(f"image {image.id[:12]} was removed meanwhile", hint="try again")
        return _write_name(host, image)


def _write_name(host: Host, image: Image) -> str:
    was = None
    with contextlib.suppress(HostError):  # a damaged one is written anew
        was = find_id(host, image.name)
    host.shell.call(files.write_file, host.store.tags / check_tag(image.name), f"{image.id}\n".encode(), 0o644)
    return was if was and was != image.id else ""


def list_names(host: Host, image_id: str) -> tuple[str, ...]:
    """The names of one image, sorted."""
    return tuple(name for name in list_tags(host) if host.read_text(host.store.tags / name).strip() == image_id)


def find_by_origin(host: Host, like: Image) -> Image | None:
    """The image in the store that was made of the same content in the same way, or None; damaged ones are passed over."""
    for image_id in list_ids(host):
        try:
            image = read(host, image_id, like.name)
        except HvctlError:
            continue
        if like.origin and image.origin == like.origin and _way(image) == _way(like):
            return image
    return None


def _way(image: Image) -> tuple[object, ...]:
    return (image.login_user, image.firmware)


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
    for artefact in image.artefacts:
        if not host.shell.call(files.exists, folder / artefact.file):
            raise HostError(f"image {name!r} has lost its file {artefact.file!r}", hint=mend)
    return made.complete(host, replace(image, name=name))
