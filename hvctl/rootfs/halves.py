"""The two halves of an image, tree and disk: the one that it did not come with is made once, when first needed, and kept.

Made aside under a lock and published by one rename below the image's directory, which is otherwise never written again;
whoever removes the image removes its halves with it. What is there is read in `made.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from hvctl.errors import WrongState
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image
from hvctl.rootfs import building, made
from hvctl.rootfs.building import Building

_LOOK_AGAIN_S = 0.05


def ensure_disk(host: Host, image: Image, events: Sink = ignore) -> Image:
    """The image with a disk, made of its tree now where it has none. Some seconds; many may ask at once.

    Raises InvalidSpec for a tree that cannot be started as a VM, HostError for a full store; nothing stays then.
    """
    if image.disk is not None or not image.has_tree:
        return image  # the backend says what is missing

    def make(work: Building, aside: Path) -> bytes:
        from hvctl.rootfs import appdisk, treedisk  # here: a half is made once, and every command pays for an import

        if image.process is not None:
            return appdisk.make(work, image, aside)
        return treedisk.make(work, image, aside)

    return _ensure(host, image, made.DISK, make, events)


def ensure_tree(host: Host, image: Image, events: Sink = ignore, *, is_trusted: bool = False) -> Image:
    """The image with a tree, read from its disk now where it has none.

    `is_trusted`: this kernel may mount file systems that hvctl cannot read itself. Raises InvalidSpec where no Linux
    root is found, Unsupported for a file system that only the kernel could read, HostError; nothing stays then.
    """
    if image.has_tree or image.disk is None:
        return image

    def make(work: Building, aside: Path) -> bytes:
        from hvctl.rootfs import disktree

        return disktree.make(work, image, aside, is_trusted=is_trusted)

    return _ensure(host, image, made.TREE, make, events)


def _ensure(host: Host, image: Image, half: str, make: Callable[[Building, Path], bytes], events: Sink) -> Image:
    """Make a half unless it is there; `make` fills a directory and gives what its half.json says."""
    call = host.shell.call
    host.require_root(f"making the {half} of image {image.name!r}")
    with _holding(host, f"half-{half}-{image.id}", image, events):
        if not call(files.exists, made.description(host, image, half)):
            events(Note(image.name, f"making its {half}, once; later instances find it there"))
            with building.begin(host, image.name, events) as work:
                aside = work.directory / "half"
                # The qemu user passes through the disk's directory; nobody enters the tree's.
                call(files.make_directory, aside, 0o700 if half == made.TREE else 0o711)
                call(files.write_file, aside / "half.json", make(work, aside), 0o444)
                call(files.make_directory, host.store.made(image.id), 0o711)
                call(files.publish, aside, host.store.made(image.id) / half)
                work.tell("done", 100)
    return made.complete(host, image)


@contextlib.contextmanager
def _holding(host: Host, name: str, image: Image, events: Sink) -> Iterator[None]:
    """Hold a lock that others may hold for minutes, and stop waiting when somebody cancels."""
    with contextlib.ExitStack() as stack:
        is_told = False
        while True:
            try:
                stack.enter_context(host.lock(name))
                break
            except WrongState:
                if not is_told:
                    events(Note(image.name, "waiting for another hvctl that is making the same"))
                is_told = True
                host.pause(_LOOK_AGAIN_S)
        yield
