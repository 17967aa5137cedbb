"""A file of the user's, or an address that the user trusts: disks (qcow2, raw, compressed), archives of root trees, and
images that hvctl exported."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from hvctl.errors import InvalidSpec
from hvctl.events import Note
from hvctl.hostside import files
from hvctl.model import Firmware, Image
from hvctl.rootfs import bundles, checksums, content, fetch, published
from hvctl.rootfs.building import Building
from hvctl.rootfs.checksums import Digest
from hvctl.rootfs.content import Described
from hvctl.rootfs.sources import Wanted

STDIN = "-"


def acquire(work: Building, wanted: Wanted) -> Image:
    """Bring what an address or an absolute path names. Raises InvalidSpec for content that is refused, NotFound, HostError."""
    digest = checksums.parse_digest(wanted.sha256) if wanted.sha256 else None
    fetched = None
    if wanted.source.startswith(("http:", "https:")):
        _check_trust(work, wanted, digest)
        fetch.take_turn(work, wanted.source)
        known = published.find_by_origin(work.host, _describe(wanted, str(digest or "")).as_image(wanted.name))
        if known is not None:
            work.events(Note(work.name, "it is here already"))
            return known
        fetched = fetch.bring(work, wanted.source)
    path = fetched.path if fetched else _find_local(work, wanted.source)
    if digest:
        fetched = fetched or fetch.measure(work, path)
        checksums.check(work, fetched, digest, wanted.source)
    if bundles.is_bundle(work.host, path):
        return bundles.take_in(work, path)
    if fetched is not None:
        sha256 = fetched.sha256
        return content.take_in(work, path, _describe(wanted, str(digest or f"sha256:{sha256}")), lambda: sha256)
    with fetch.hashing(work, path) as find_sha256:
        image = content.take_in(work, path, _describe(wanted, ""), find_sha256)
        return replace(image, origin=f"sha256:{find_sha256()}")


def _find_local(work: Building, source: str) -> Path:
    """The file of this host that is meant; what comes by stdin is written to one."""
    path = Path(source.removeprefix("file://"))
    if source == STDIN:
        work.tell("reading stdin", 0)
        path = work.directory / "stdin"
        work.host.shell.call(files.receive, sys.stdin.fileno(), path)
    fetch.check_local(path)
    return path


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
