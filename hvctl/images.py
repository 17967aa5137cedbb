"""Images: build, bring, list, show, delete, prune. One in use cannot be deleted; a rebuilt name leaves the old one there.

A name is a tag, one file with an identifier; the image itself lies under its identifier and is never written again.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hvctl import metadata
from hvctl.errors import HvctlError, NotFound, WrongState
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import fetch, made, published, sources
from hvctl.rootfs.request import BuildRequest, parse_request
from hvctl.rootfs.sources import Wanted
from hvctl.units import format_size
from hvctl.values import dataclass

if TYPE_CHECKING:
    from hvctl.rootfs.containerfile import Recipe

__all__ = [
    "BuildRequest",
    "Listed",
    "Wanted",
    "bring",
    "build",
    "build_recipe",
    "delete",
    "find_unused",
    "get",
    "get_or_bring",
    "list_images",
    "parse_request",
    "prune",
    "tidy",
    "users_of",
]

_GOING = ".going-"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An image as `image list` gives it."""

    name: str
    image: Image | None
    """None when it is damaged or gone; `problem` says how."""
    size_bytes: int = 0
    """What its files take in the store; the root tree of an image that hvctl built with its disk is left out."""
    users: tuple[str, ...] = ()
    """Names of the instances that stand on it."""
    made: tuple[str, ...] = ()
    """The half that was made of it: `disk`, `tree`."""
    problem: str = ""


def build(host: Host, request: BuildRequest, events: Sink = ignore) -> Image:
    """Build an image and give it its name; an older image of that name stays as long as an instance uses it.

    Takes a minute or two. Raises HostError without root or space, CommandFailed when a program fails; the name then
    still means what it did.
    """
    host.require_root("image build")
    from hvctl.rootfs import debian  # here: nothing else needs what it needs

    image = debian.build(host, request, events)
    with contextlib.suppress(HvctlError):  # the image is there; an old one can go another time
        prune(host)
    return image


def build_recipe(host: Host, recipe: Recipe, events: Sink = ignore) -> Image:
    """Build an image from a Containerfile and give it its name. Raises as `containerfile.build`."""
    host.require_root("image build")
    published.check_tag(recipe.name)
    from hvctl.rootfs import containerfile  # here: nothing else needs what it needs

    image = containerfile.build(host, recipe, events)
    with contextlib.suppress(HvctlError):  # the image is there; an old one can go another time
        prune(host)
    return image


def bring(host: Host, wanted: Wanted, events: Sink = ignore) -> Image:
    """Bring an image from elsewhere and give it its name; an older image of that name stays as long as it is used.

    Raises InvalidSpec for a source that is unknown or whose content is refused, NotFound, HostError, TimedOut; the name
    then still means what it did.
    """
    host.require_root("image pull")
    image = sources.bring(host, wanted, events)
    with contextlib.suppress(HvctlError):  # the image is there; an old one can go another time
        prune(host)
    return image


def get_or_bring(host: Host, source: str, *, is_insecure: bool = False, events: Sink = ignore) -> Image:
    """The image of this name; or, of a source, the one that came from there, brought here now where there is none.

    Raises what `bring` raises, and NotFound for a name that no image has.
    """
    if not sources.is_source(source):
        return published.get_image(host, source)
    name, own_name = sources.suggest_name(source), sources.suggest_name(source, is_unique=True)
    named, own = published.find_image(host, name), published.find_image(host, own_name)
    if named is not None and named.source == source:
        return named
    if own is not None:
        return own
    # Nobody else's image loses its name to something that is only to be run.
    wanted = Wanted(name=own_name if named else name, source=source, is_insecure=is_insecure)
    return bring(host, wanted, events)


def get(host: Host, name: str) -> Listed:
    """One image by name. Raises NotFound, and HostError when it is damaged."""
    image = published.get_image(host, name)
    return _listed(host, image, _users_by_image(host))


def list_images(host: Host) -> tuple[Listed, ...]:
    """All images by name, the damaged ones too."""
    users = _users_by_image(host)
    found = []
    for name in published.list_tags(host):
        try:
            image = published.find_image(host, name)
        except HvctlError as error:
            found.append(Listed(name=name, image=None, problem=error.message))
        else:
            found += [_listed(host, image, users)] if image else []
    return tuple(found)


def delete(host: Host, name: str) -> None:
    """Delete an image and its name.

    Raises NotFound, and WrongState with the names of the instances while any stands on it. A damaged image can be
    deleted too.
    """
    host.require_root("image delete")
    tag = host.store.tags / published.check_tag(name)
    with published.changing(host):
        if not host.shell.call(files.exists, tag):
            raise NotFound(f"there is no image {name!r}", hint="see which there are: hvctl image list")
        image_id = _find_id(host, name)
        users = users_of(host, image_id)
        if users and _named_ids(host).count(image_id) == 1:
            raise WrongState(
                f"image {name!r} is in use by {', '.join(users)}",
                hint=f"delete them first: hvctl delete {' '.join(users)}",
            )
        host.shell.call(files.remove, tag)
    prune(host)


def users_of(host: Host, image_id: str) -> tuple[str, ...]:
    """The names of the instances that stand on an image, sorted; lost ones, which only the store remembers, too."""
    return _users_by_image(host).get(image_id, ())


def find_unused(host: Host) -> tuple[str, ...]:
    """The identifiers of images that have no name any more and no user.

    Raises HostError unless both of libvirt's drivers answered for those without a name.
    """
    named = _named_ids(host)
    nameless = [id_ for id_ in published.list_ids(host) if id_ not in named]
    users = _users_by_image(host) if nameless else {}  # mostly there are none, and libvirt need not be asked
    return tuple(id_ for id_ in nameless if id_ not in users)


def tidy(host: Host, *, dry_run: bool = False) -> tuple[str, ...]:
    """Remove all that nothing uses: images without name and user, downloads that nobody is at; a line for each.

    With `dry_run` nothing is removed. Raises HostError unless both of libvirt's drivers answered.
    """
    host.require_root("image prune")
    found = [f"image {image_id[:12]} ({_describe_size(host, image_id)})" for image_id in find_unused(host)]
    if not dry_run:
        prune(host)
    return (*found, *fetch.collect(host, dry_run=dry_run, at_once=True))


def prune(host: Host) -> tuple[str, ...]:
    """Remove images that have no name any more and no user; their identifiers.

    Raises HostError unless both of libvirt's drivers answered for those without a name.
    """
    call = host.shell.call
    with published.changing(host):
        unused = find_unused(host)
        # `create` takes no lock of ours. So an image is first moved out of reach: whoever claimed it before is seen by
        # the second look, and it comes back; whoever comes later does not find it any more.
        for image_id in unused:
            call(files.publish, host.store.image(image_id), host.store.images / f"{_GOING}{image_id}")
        return _finish_going(host)


def _describe_size(host: Host, image_id: str) -> str:
    """What of the disk comes free with it."""
    return format_size(host.shell.call(files.disk_usage, host.store.image(image_id)))


def _finish_going(host: Host) -> tuple[str, ...]:
    """Remove what was moved out of reach, now or before a crash, and has no user; put the rest back."""
    call = host.shell.call
    going = [name for name in call(files.list_names, host.store.images) if name.startswith(_GOING)]
    users, gone = _users_by_image(host) if going else {}, []
    for name in going:
        image_id = name.removeprefix(_GOING)
        if image_id in users and not call(files.exists, host.store.image(image_id)):
            call(files.publish, host.store.images / name, host.store.image(image_id))
        else:
            call(files.remove, host.store.images / name)
            gone.append(image_id)
    return tuple(gone)


def _named_ids(host: Host) -> list[str]:
    """The identifiers that names stand for, once for each name; damaged names stand for none."""
    return [image_id for name in published.list_tags(host) if (image_id := _find_id(host, name))]


def _find_id(host: Host, name: str) -> str:
    try:
        return published.find_id(host, name) or ""
    except HvctlError:
        return ""


def _listed(host: Host, image: Image, users: dict[str, tuple[str, ...]]) -> Listed:
    halves = made.list_made(host, image.id)
    size_bytes = sum(part.size_bytes for part in image.artefacts)
    if image.has_tree and (made.TREE in halves or made.DISK in halves or image.disk is None):
        with contextlib.suppress(HvctlError):  # only root can look
            size_bytes += host.shell.call(files.disk_usage, host.store.image_tree(image.id))
    return Listed(name=image.name, image=image, size_bytes=size_bytes, users=users.get(image.id, ()), made=halves)


def _users_by_image(host: Host) -> dict[str, tuple[str, ...]]:
    """Image identifier -> names of its users: from libvirt, and from the copies in the store, in case a definition
    was removed behind our back and is to be recovered."""
    pairs = {(instance.record.image_id, instance.name) for instance in host.instances()}
    for uuid in host.shell.call(files.list_names, host.store.instances):
        definition = host.store.instances / uuid / "domain.xml"
        if host.shell.call(files.exists, definition):
            record = metadata.find(host.read_text(definition))
            pairs |= {(record.image_id, record.name)} if record is not None else set()
    users: dict[str, tuple[str, ...]] = {}
    for image_id, name in sorted(pairs):
        users[image_id] = (*users.get(image_id, ()), name)
    return users
