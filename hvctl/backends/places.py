"""Places in a container at which a directory of the host's or a volume may be seen, checked before anything is made."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from hvctl.errors import InvalidSpec
from hvctl.host import Host
from hvctl.hostside import files, targets
from hvctl.model import Image, Mount, Spec

_TARGET = re.compile(r"/[A-Za-z0-9._/@+-]{1,255}", re.ASCII)
_RESERVED = ("/.oldroot", "/dev", "/proc", "/sys", "/run", "/etc/hvctl")
"""Places in a container where libvirt or the kernel puts something of its own."""
_SYSTEM = frozenset(f"/{name}" for name in ("bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr")) | {
    f"/usr/{name}" for name in ("bin", "lib", "lib32", "lib64", "libexec", "libx32", "sbin")
}
"""What a system boots from. Something mounted over it would hide it, and what the boot writes there would go outside."""


def check_mounts(host: Host, spec: Spec, image: Image) -> None:
    """Raise InvalidSpec for a shared directory that cannot be."""
    taken = [mount.target for mount in spec.mounts]
    for mount in spec.mounts:
        _check_source(host, mount)
        if not PurePosixPath(mount.target).is_absolute():
            raise InvalidSpec(f"{mount.target!r} is no absolute path", hint="--mount /srv/data:/data")
        plain = posixpath.normpath(f"//{mount.target}")  # it keeps two slashes at the beginning, of three one
        check_place(plain, "--mount /srv/data:/data")
        if plain != mount.target:
            raise InvalidSpec(
                f"{mount.target!r} is not the shortest way to that place",
                hint=f"--mount {shlex.quote(f'{mount.source}:{plain}')}",
            )
        if taken.count(mount.target) > 1:
            raise InvalidSpec(f"{mount.target!r} is given twice", hint="one --mount for each place")
        check_apart(mount.target, taken, "--mount /srv/data:/data")
        if image.has_tree and (
            obstacle := host.shell.call(targets.find_obstacle, host.store.image_tree(image.id), mount.target)
        ):
            raise InvalidSpec(
                f"{obstacle!r} is a file or a link in image {image.name!r}, and nothing is mounted over or through it",
                hint="choose another place, or the one that it leads to: --mount /srv/data:/data",
            )


def _check_source(host: Host, mount: Mount) -> None:
    if host.shell.call(files.is_directory, Path(mount.source)):
        return
    if not host.shell.call(files.exists, Path(mount.source)):
        raise InvalidSpec(f"{mount.source!r} is not there on this host", hint=f"mkdir {shlex.quote(mount.source)}")
    folder = posixpath.dirname(mount.source)
    raise InvalidSpec(
        f"{mount.source!r} is no directory, and nothing else can be shared",
        hint=f"share the one that it is in: --mount {shlex.quote(f'{folder}:{mount.target}')}",
    )


def check_free(target: str) -> None:
    """Raise InvalidSpec for a path at which no volume may be."""
    if not _TARGET.fullmatch(target) or posixpath.normpath(target) != target:
        raise InvalidSpec(f"{target!r} is no place in a container", hint="--target /srv/data")
    check_place(target, "--target /srv/data")


def check_apart(target: str, others: Collection[str], example: str) -> None:
    """Raise InvalidSpec for a place that lies in another, or that another lies in (`hostside/targets.py` says why not)."""
    if outer := targets.find_outer(target, others):
        raise InvalidSpec(
            f"{target!r} and {outer!r} lie in each other, and who writes to one could lead the other elsewhere",
            hint=f"places apart: {example}",
        )


def check_place(target: str, example: str) -> None:
    """Raise InvalidSpec for a place in a container that it needs itself. `example`: another, as the user would say it."""
    if target == "/" or any(PurePosixPath(target).is_relative_to(path) for path in _RESERVED):
        raise InvalidSpec(f"{target!r} is the container's own", hint=example)
    if target in _SYSTEM:
        raise InvalidSpec(
            f"{target!r} holds the container's own system, which would be hidden",
            hint=f"{example}, or a directory in it: {target}/NAME",
        )
