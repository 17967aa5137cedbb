"""Where images come from: which kind of source a user's words mean, and the one way from there to a published image.

Each kind is a module with `acquire(building, wanted) -> Image`: it brings the content into the building's directory,
confined and verified, and describes it; sealing and publishing are done here. A new kind is a row in `_KINDS`.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import replace

from hvctl.errors import InvalidSpec
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.model import Firmware, Image
from hvctl.rootfs import building
from hvctl.rootfs.building import Building
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An image that is to be brought here."""

    name: str
    source: str
    """`docker://...`, `images:debian/12`, an address, a file, a name in the catalogue: as it was typed."""
    sha256: str = ""
    """What the file must have, in hex, where the user says so."""
    is_insecure: bool = False
    """Whether the user renounced checksums and signatures."""
    login_user: str = ""
    """Who logs in; empty: what the source says, or what is usual there."""
    firmware: Firmware | None = None
    """What its disk needs to boot, where the user says so."""
    format: str = ""
    """Of a disk, `raw` or `qcow2`, where the user says so."""


Acquire = Callable[[Building, Wanted], Image]

USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
"""Whoever may log in is called so (useradd(8))."""

_APPLICATION = re.compile(r"docker://|oci:|oci-archive:|docker-archive:")

# What the source begins with -> the module that knows it. The first that matches.
_KINDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (_APPLICATION, "hvctl.rootfs.oci"),
    (re.compile(r"images:"), "hvctl.rootfs.simplestreams"),
    (re.compile(r"(?:https?|file)://|/|-$"), "hvctl.rootfs.imported"),
    (re.compile(r"[a-z0-9][a-z0-9.-]{0,62}$", re.ASCII), "hvctl.rootfs.catalogue"),
)


def bring(host: Host, wanted: Wanted, events: Sink = ignore) -> Image:
    """Bring an image here and give it its name; nothing stays of one that fails.

    Raises InvalidSpec for a source of no known kind, or one that is refused; HostError, NotFound, TimedOut.
    """
    acquire = _find_kind(wanted.source)
    if wanted.login_user and not USER.fullmatch(wanted.login_user):
        raise InvalidSpec(f"{wanted.login_user[:40]!r} is no name of a user", hint="--user debian")
    with building.begin(host, wanted.name, events) as work:
        image = acquire(work, wanted)
        return work.publish(replace(image, name=wanted.name, source=image.source or wanted.source))


def is_source(text: str) -> bool:
    """Whether a user's words can only mean a place that images come from, and not the name of one that is here."""
    return ":" in text and any(pattern.match(text) for pattern, _module in _KINDS)


def is_application(source: str) -> bool:
    """Whether application images come from there."""
    return _APPLICATION.match(source) is not None


def suggest_name(source: str, *, is_unique: bool = False) -> str:
    """A name for an image from there: the last part of its path, with its tag; `is_unique`: no other source's."""
    last = source.partition("@")[0].removesuffix(":latest").rpartition("/")[2]
    parts = [part for part in last.removeprefix(source.partition(":")[0]).split(":") if part]
    name = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", "-".join(parts).lower()).strip("._-")[:48].strip("._-") or "image"
    return f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}" if is_unique else name


def _find_kind(source: str) -> Acquire:
    for pattern, module in _KINDS:
        if pattern.match(source):
            acquire: Acquire = importlib.import_module(module).acquire
            return acquire
    raise InvalidSpec(f"{source[:200]!r} is no source of images that hvctl knows", hint="hvctl image pull --help")
