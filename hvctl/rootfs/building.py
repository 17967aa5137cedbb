"""An image in the making: a private directory of the store, published by one rename.

A build that fails or is killed leaves nothing but that directory, which the next build, or `hvctl gc`, removes once its
lock is free.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path

from hvctl.errors import HostError, HvctlError
from hvctl.events import Note, Progress, Sink
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Artefact, Image
from hvctl.rootfs import manifest, published
from hvctl.units import format_size
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Building:
    """A build under way: where it works and whom it tells."""

    host: Host
    name: str
    """Of the image, and of the subject of what is told."""
    directory: Path
    """Private (0700), gone when the build has ended."""
    events: Sink
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What is let go of when the build has ended: locks on what it brings here."""
    spent: list[Path] = field(default_factory=list)
    """Files elsewhere that nobody needs any more once the image is published."""

    @property
    def image(self) -> Path:
        """Becomes the image's directory."""
        return self.directory / "image"

    @property
    def rootfs(self) -> Path:
        return self.image / "tree" / "rootfs"

    def tell(self, task: str, done: float, total: float = 100) -> None:
        """Report how far a task is; raises Interrupted when somebody cancels."""
        self.host.pause(0)
        self.events(Progress(self.name, task, done, total))

    def artefact(self, path: Path) -> Artefact:
        """One finished file of the image, made read-only."""
        call = self.host.shell.call
        call(files.set_mode, path, 0o444)
        return Artefact(file=path.name, size_bytes=call(files.size, path), sha256=call(files.hash_file, path))

    def publish(self, image: Image) -> Image:
        """Seal the image, give its directory its place and the image its name; the sealed image.

        One that has an identifier is in the store already, and is only given its name.
        """
        call = self.host.shell.call
        if image.id:
            self._tell_of_other(published.give_name(self.host, image), image)
            self._tell_of_twins(image)
            return image
        sealed = manifest.seal(image)
        call(files.write_file, self.image / "manifest.json", manifest.format_manifest(sealed), 0o444)
        self.tell("publishing", 98)
        call(files.set_mode, self.image, 0o711)
        self._tell_of_other(published.publish(self.host, self.image, sealed), sealed)
        if self.spent:
            from hvctl.hostside import download  # brings TLS along, which few commands need

            for path in self.spent:
                call(download.discard, path)
        self._tell_of_twins(sealed)
        self.tell("done", 100)
        return sealed

    def _tell_of_other(self, was: str, image: Image) -> None:
        """The name meant another image, which stays without it as long as an instance stands on that."""
        if was:
            self.events(Note(self.name, f"was {was[:12]}, is now {image.id[:12]}; instances keep what they stand on"))

    def _tell_of_twins(self, image: Image) -> None:
        """The same content is in the store once, whatever it is called."""
        others = []
        with contextlib.suppress(HvctlError):  # a name that goes at this moment
            others = [name for name in published.list_names(self.host, image.id) if name != image.name]
        if others:
            self.events(Note(self.name, f"the same content as {', '.join(others)}: one image, kept once"))


@contextlib.contextmanager
def begin(host: Host, name: str, events: Sink, *, needed_bytes: int = 0) -> Iterator[Building]:
    """A private directory for the block, `image/` in it; its lock tells `gc` that somebody is working there.

    Raises HostError when the store has less than `needed_bytes` free.
    """
    published.check_tag(name)
    collect(host)
    check_space(host, f"making {name!r}", needed_bytes)
    token = os.urandom(8).hex()
    directory = host.store.building / token
    with host.lock(f"building-{token}"):
        try:
            host.shell.call(files.make_directory, directory, 0o700)
            work = Building(host=host, name=name, directory=directory, events=events)
            host.shell.call(files.make_directory, work.image, 0o700)
            with work.held:
                yield work
        finally:
            host.shell.call(files.remove, directory)


def collect(host: Host, *, dry_run: bool = False) -> list[str]:
    """Remove what killed builds left: directories whose lock is free. Their names."""
    found = []
    for name in host.shell.call(files.list_names, host.store.building):
        if host.is_busy(f"building-{name}"):
            continue
        if not dry_run:
            host.shell.call(files.remove, host.store.building / name)
        found.append(name)
    return found


def check_space(host: Host, what: str, needed_bytes: int) -> None:
    """Raise HostError when the store has less than `needed_bytes` free."""
    available_bytes = host.shell.call(files.available_bytes, host.store.building)
    if available_bytes < needed_bytes:
        raise HostError(
            f"{what} takes {format_size(needed_bytes)} in {str(host.store.root)!r}, "
            f"and only {format_size(available_bytes)} are free",
            hint="free some space: hvctl image list; hvctl gc",
        )
