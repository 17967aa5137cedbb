"""A file of the user's, or an address that the user trusts: disks (qcow2, raw, compressed) and archives of root trees."""

from __future__ import annotations

from pathlib import Path

from hvctl.errors import InvalidSpec
from hvctl.events import Note
from hvctl.model import Firmware, Image
from hvctl.rootfs import checksums, content, fetch, published
from hvctl.rootfs.building import Building
from hvctl.rootfs.checksums import Digest
from hvctl.rootfs.content import Described
from hvctl.rootfs.sources import Wanted


def acquire(work: Building, wanted: Wanted) -> Image:
    """Bring what an address or an absolute path names. Raises InvalidSpec for content that is refused, NotFound, HostError."""
    digest = checksums.parse_digest(wanted.sha256) if wanted.sha256 else None
    is_remote = wanted.source.startswith(("http:", "https:"))
    if is_remote:
        _check_trust(work, wanted, digest)
        fetch.take_turn(work, wanted.source)
        known = published.find_by_origin(work.host, _describe(wanted, str(digest or "")).as_image(wanted.name))
        if known is not None:
            work.events(Note(work.name, "it is here already"))
            return known
        fetched = fetch.bring(work, wanted.source)
    else:
        fetched = fetch.measure(work, Path(wanted.source.removeprefix("file://")))
    if digest:
        checksums.check(work, fetched, digest, wanted.source)
    return content.take_in(work, fetched, _describe(wanted, str(digest or f"sha256:{fetched.sha256}")))


def _check_trust(work: Building, wanted: Wanted, digest: Digest | None) -> None:
    """A digest, or `--insecure`, which then says each time what it went without."""
    if digest:
        return
    if not wanted.is_insecure:
        raise InvalidSpec(
            f"nothing says what {wanted.source[:200]!r} must be",
            hint="add --sha256 HEX, or take whatever comes: --insecure",
        )
    work.events(Note(work.name, "not verified: there is no digest to compare it with (--insecure)"))


def _describe(wanted: Wanted, origin: str) -> Described:
    return Described(
        source=wanted.source,
        origin=origin,
        login_user=wanted.login_user,
        firmware=wanted.firmware or Firmware.BIOS,
        format=wanted.format,
    )
