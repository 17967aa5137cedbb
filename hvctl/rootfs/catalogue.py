"""The catalogue: cloud images by name, from a plain data file (`catalogue.toml`) and the user's own.

Pulling one means: its file of checksums, that file's signature, then the image, which must have the digest. Each level is
there or is said to be missing; what an entry promises and the server does not have is an error, not a warning.
"""

from __future__ import annotations

import tomllib
import urllib.parse
from pathlib import Path
from typing import Any

from hvctl import config
from hvctl.errors import InvalidSpec, NotFound
from hvctl.events import Note
from hvctl.hostside import files
from hvctl.model import Firmware, Image
from hvctl.rootfs import checksums, content, fetch, published, request, signature
from hvctl.rootfs.building import Building
from hvctl.rootfs.checksums import Digest
from hvctl.rootfs.content import Described
from hvctl.rootfs.sources import USER, Wanted
from hvctl.values import dataclass

_BUILT_IN = Path(__file__).with_name("catalogue.toml")
_SIGNATURE_BYTES = 256 * 1024
_FORMATS = ("", "qcow2", "raw")
_KNOWN = frozenset(
    (
        "address",
        "checksums",
        "signature",
        "clearsigned",
        "fingerprint",
        "keys",
        "os",
        "version",
        "user",
        "firmware",
        "format",
    )
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image of the catalogue."""

    name: str
    address: str
    checksums: str = ""
    """Address of the file of digests; empty: none is published."""
    signature: str = ""
    """Address of that file's detached signature."""
    is_clearsigned: bool = False
    fingerprints: tuple[str, ...] = ()
    keys: str = ""
    """Address or path of the key ring."""
    os: str = ""
    version: str = ""
    user: str = ""
    firmware: Firmware = Firmware.BIOS
    format: str = ""
    file: Path = _BUILT_IN
    """Where it stands."""

    @property
    def trust(self) -> str:
        """How far what comes can be trusted, in a word: `signature`, `https` (digests that came by it) or `nothing`."""
        if self.signature or self.is_clearsigned:
            return "signature"
        return "https" if self.checksums and fetch.is_safe(self.checksums) else "nothing"


def load() -> tuple[Entry, ...]:
    """All entries by name; the user's file goes before the system's, and that before hvctl's own.

    Raises InvalidSpec for a file that is not what it should be.
    """
    found: dict[str, Entry] = {}
    for file in (_BUILT_IN, config.SYSTEM_FILE.with_name("catalogue.toml"), config.config_home() / "catalogue.toml"):
        try:
            text = files.read_file(file).decode()
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSpec(f"cannot read {file}: {error}", hint=f"edit {file}") from error
        found |= {entry.name: entry for entry in _parse(text, file)}
    return tuple(found[name] for name in sorted(found))


def find(name: str) -> Entry | None:
    """The entry of this name."""
    return next((entry for entry in load() if entry.name == name), None)


def acquire(work: Building, wanted: Wanted) -> Image:
    """Bring an image of the catalogue. Raises NotFound for none of that name, InvalidSpec when it is not what it should be."""
    entry = _get(wanted.source)
    digest = checksums.parse_digest(wanted.sha256) if wanted.sha256 else _find_digest(work, entry, wanted)
    described = Described(
        source=entry.address,
        origin=str(digest or ""),
        os=entry.os,
        version=entry.version,
        login_user=wanted.login_user or entry.user,
        firmware=wanted.firmware or entry.firmware,
        format=wanted.format or entry.format,
    )
    fetch.take_turn(work, entry.address)
    known = published.find_by_origin(work.host, described.as_image(wanted.name))
    if known is not None:
        work.events(Note(work.name, "it is here already, and the newest"))
        return known
    fetched = fetch.bring(work, entry.address)
    if digest:
        checksums.check(work, fetched, digest, entry.address)
    return content.take_in(work, fetched.path, described, lambda: fetched.sha256)


def _get(name: str) -> Entry:
    entry = find(name)
    if entry is not None:
        return entry
    hint = "see which there are: hvctl image catalogue"
    if request.is_buildable(name):
        hint = f"hvctl image build {name}; Debian's own cloud image is another: hvctl image pull debian-12-cloud"
    elif (similar := [one.name for one in load() if one.name.startswith(name)]) or name.split("-")[0] != name:
        hint = f"did you mean {' or '.join(similar[:3])}? {hint}" if similar else hint
    raise NotFound(f"there is no {name!r} in the catalogue", hint=hint)


def _find_digest(work: Building, entry: Entry, wanted: Wanted) -> Digest | None:
    """What the image must have, from its checksums, signature verified; what was not verified is said each time."""
    if not entry.checksums:
        _need_insecure(work, wanted, f"nobody publishes a digest for {entry.name!r}")
        return None
    text = fetch.read(work, entry.checksums)
    if entry.trust == "signature":
        if wanted.is_insecure:
            work.events(Note(work.name, "not verified: the signature of its checksums (--insecure)"))
        else:
            text = _verify(work, entry, text)
    elif entry.trust == "https":
        work.events(Note(work.name, "its checksums are not signed: they are as good as the https connection"))
    else:
        _need_insecure(work, wanted, f"the checksums of {entry.name!r} are not signed, and come over plain http")
    name, of = (urllib.parse.urlsplit(address).path.rpartition("/")[2] for address in (entry.address, entry.checksums))
    return checksums.find_digest(text.decode(errors="replace"), name, is_for_one=of.startswith(name))


def _need_insecure(work: Building, wanted: Wanted, what: str) -> None:
    if not wanted.is_insecure:
        raise InvalidSpec(what, hint="give what it must be: --sha256 HEX; or take whatever comes: --insecure")
    work.events(Note(work.name, f"not verified: {what} (--insecure)"))


def _verify(work: Building, entry: Entry, text: bytes) -> bytes:
    """What was signed. Raises InvalidSpec, NotFound."""
    detached = fetch.read(work, entry.signature, limit_bytes=_SIGNATURE_BYTES) if entry.signature else None
    if entry.keys.startswith("/"):
        try:
            keys = files.read_file(Path(entry.keys))
        except OSError as error:
            raise NotFound(
                f"cannot read the key ring of {entry.name!r}, {entry.keys!r}: {error.strerror}",
                hint="install it, or go without: --insecure",
            ) from error
    else:
        keys = fetch.read(work, entry.keys)
    try:
        return signature.verify(work.host, work.directory, text, detached, keys, entry.fingerprints)
    except InvalidSpec as error:
        raise InvalidSpec(
            f"the checksums of {entry.name!r} are not to be trusted: {error.message}", hint=error.hint
        ) from error


def _parse(text: str, file: Path) -> list[Entry]:
    try:
        tables = tomllib.loads(text)
        return [_parse_entry(name, table, file) for name, table in tables.items()]
    except tomllib.TOMLDecodeError as error:
        raise InvalidSpec(f"{file} is not valid TOML: {error}", hint=f"edit {file}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidSpec(f"{file} is no catalogue: {error}", hint=f"edit {file}; see {_BUILT_IN}") from error


def _parse_entry(name: str, table: dict[str, Any], file: Path) -> Entry:
    published.check_tag(name)
    unknown = sorted(set(table) - _KNOWN)
    if unknown:
        raise ValueError(f"{name!r} has an unknown key {unknown[0]!r} (known: {', '.join(sorted(_KNOWN))})")
    address = _parse_address(table["address"], "")
    is_clearsigned = table.get("clearsigned", False) is True
    fingerprint = table.get("fingerprint", [])
    entry = Entry(
        name=name,
        address=address,
        checksums=_parse_address(table.get("checksums", ""), address),
        signature=_parse_address(table.get("signature", ""), address),
        is_clearsigned=is_clearsigned,
        fingerprints=tuple(
            map(signature.check_fingerprint, [fingerprint] if isinstance(fingerprint, str) else fingerprint)
        ),
        keys=_parse_keys(table.get("keys", "")),
        os=_parse_word(table.get("os", "")),
        version=_parse_word(table.get("version", "")),
        user=_parse_user(table.get("user", "")),
        firmware=Firmware(table.get("firmware", "bios")),
        format=_parse_word(table.get("format", "")),
        file=file,
    )
    if entry.format not in _FORMATS:
        raise ValueError(f"{name!r} has a format {entry.format!r} (known: qcow2, raw)")
    if entry.trust == "signature" and not (
        entry.checksums and entry.keys and (entry.fingerprints or entry.keys[0] == "/")
    ):
        raise ValueError(
            f"{name!r} has a signature, so it needs checksums, keys and, unless keys is a path, a fingerprint"
        )
    return entry


def _parse_address(text: str, base: str) -> str:
    """A full address; a name alone stands beside `base`."""
    address = urllib.parse.urljoin(base, text) if text else ""
    if address and not address.startswith(("https://", "http://", "file:///")):
        raise ValueError(f"{text!r} is no address that begins with https://, http:// or file:///")
    return address


def _parse_keys(text: str) -> str:
    return text if text.startswith("/") else _parse_address(text, "")


def _parse_user(text: str) -> str:
    if text and not USER.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a user")
    return text


def _parse_word(text: str) -> str:
    if not isinstance(text, str) or not text.isprintable() or len(text) > 64:
        raise ValueError(f"{text!r} is no word")
    return text
