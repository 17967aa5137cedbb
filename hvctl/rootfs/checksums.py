"""Files of checksums, as distributions publish them: which digest a file must have.

HEX  NAME    HEX *NAME        coreutils: Debian, Ubuntu, Arch, openSUSE, CentOS
SHA256 (NAME) = HEX           BSD: Fedora, Rocky, AlmaLinux; in an OpenPGP clear-signed message or not
HEX                           nothing else in the file: Alpine
"""

from __future__ import annotations

import hmac
import re

from hvctl.errors import InvalidSpec
from hvctl.rootfs import fetch
from hvctl.rootfs.building import Building
from hvctl.rootfs.fetch import Fetched
from hvctl.values import dataclass

_LENGTHS = {64: "sha256", 128: "sha512"}
_PLAIN = re.compile(r"\\?([0-9a-fA-F]{64}|[0-9a-fA-F]{128}) [ *](.+)")
_BSD = re.compile(r"SHA(?:256|512) \((.+)\) = ([0-9a-fA-F]{64}|[0-9a-fA-F]{128})")
_ALONE = re.compile(r"([0-9a-fA-F]{64}|[0-9a-fA-F]{128})")


@dataclass(frozen=True)
class Digest:
    """What a file must have: `sha256` or `sha512`, and the digest in lower-case hex."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def parse_digest(text: str) -> Digest:
    """A digest as a user types it: 64 or 128 hexadecimal digits, with `sha256:` or `sha512:` before them or not."""
    algorithm, _, digits = text.strip().rpartition(":")
    if not _ALONE.fullmatch(digits) or algorithm not in ("", _LENGTHS[len(digits)]):
        raise InvalidSpec(f"{text[:140]!r} is no SHA-256 digest", hint="give 64 hexadecimal digits: sha256sum FILE")
    return _digest(digits)


def find_digest(text: str, name: str, *, is_for_one: bool) -> Digest:
    """The digest of the file `name` in a file of checksums; the strongest where there are several.

    `is_for_one`: the file is about that one alone, so that a single digest in it is meant whatever name it says (a link
    to the latest release has another name than what it points to). Raises InvalidSpec when there is none.
    """
    entries = [entry for line in text.splitlines() if (entry := _parse_line(line.strip()))]
    found = [digest for digest, named in entries if named in (name, f"./{name}")]
    if not found and is_for_one and len(entries) == 1:
        found = [entries[0][0]]
    if not found:
        raise InvalidSpec(
            f"the checksums name no file {name[:100]!r}", hint="its address may be old: see hvctl image catalogue"
        )
    if any(one.algorithm == other.algorithm and one != other for one in found for other in found):
        raise InvalidSpec(f"the checksums name two digests for {name[:100]!r}", hint="tell whoever publishes it")
    return max(found, key=lambda digest: len(digest.hex))


def check(work: Building, fetched: Fetched, digest: Digest, source: str) -> None:
    """Raise InvalidSpec unless the file is the one that the digest is of; a download is forgotten then."""
    found = {"sha256": fetched.sha256, "sha512": fetched.sha512}[digest.algorithm]
    if not hmac.compare_digest(found, digest.hex):
        fetch.forget(work, fetched)
        raise InvalidSpec(
            f"{source[:200]!r} is not what it should be: its {digest.algorithm} is {found[:16]}..., not {digest.hex[:16]}...",
            hint="try again: it may just have been replaced by a newer one; if it stays so, do not use it",
        )


def _parse_line(line: str) -> tuple[Digest, str] | None:
    """A digest and the name that it is for; the name is empty where the line has none."""
    if match := _PLAIN.fullmatch(line):
        return _digest(match.group(1)), match.group(2)
    if match := _BSD.fullmatch(line):
        return _digest(match.group(2)), match.group(1)
    if match := _ALONE.fullmatch(line):
        return _digest(match.group(1)), ""
    return None


def _digest(digits: str) -> Digest:
    return Digest(_LENGTHS[len(digits)], digits.lower())
