"""OpenPGP signatures on files of checksums, checked by gpgv with the keys of one publisher and nobody else's.

Detached (`SHA256SUMS.gpg`) and clear-signed (Fedora's `CHECKSUM`); of the latter only what was signed is handed on, not
what stands around it. gpgv knows no web of trust and asks no key server: a signature is good when a key of the key ring
made it, and that key is one of the fingerprints that are pinned.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from hvctl.errors import HostError, InvalidSpec
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.hostside.sandbox import WORK
from hvctl.rootfs.confined import run_confined

_ARMOUR = re.compile(rb"-----BEGIN PGP [A-Z ]+-----\r?\n(.*?)-----END PGP [A-Z ]+-----", re.DOTALL)
_FINGERPRINT = re.compile(r"[0-9A-F]{40}|[0-9A-F]{64}", re.ASCII)
# gpgv(1), --status-fd; GnuPG's doc/DETAILS: the last field is the primary key's fingerprint.
_VALID = re.compile(r"^\[GNUPG:\] VALIDSIG .* ([0-9A-F]{40,64})$", re.MULTILINE)
_REASONS = (
    ("NO_PUBKEY", "it was made by another key"),
    ("EXPKEYSIG", "the key has expired"),
    ("REVKEYSIG", "the key was revoked"),
    ("EXPSIG", "the signature has expired"),
    ("BADSIG", "the content was changed after it was signed"),
    ("NODATA", "there is no signature in it"),
)


def check_fingerprint(text: str) -> str:
    """The fingerprint of a key, blanks removed, in upper case. Raises InvalidSpec."""
    fingerprint = text.replace(" ", "").upper()
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise InvalidSpec(f"{text[:80]!r} is no fingerprint of a key", hint="40 hexadecimal digits: gpg --fingerprint")
    return fingerprint


def verify(
    host: Host, folder: Path, signed: bytes, signature: bytes | None, keys: bytes, fingerprints: tuple[str, ...]
) -> bytes:
    """What was signed, once its signature is proven good; without `signature` the message must be clear-signed.

    `keys`: a key ring, armoured or not. `fingerprints`: of primary keys that may have signed; empty: all in the key ring.
    gpgv runs confined, in a directory below `folder`. Raises InvalidSpec with the reason.
    """
    call, scratch = host.shell.call, folder / "signature"
    call(files.make_directory, scratch, 0o700)
    contents = {"keys": remove_armour(keys), "signed": signed, "signature": signature}
    try:
        for name, content in contents.items():
            if content is not None:
                call(files.write_file, scratch / name, content, 0o600)
        what = ["--output", "output", "--", "signed"] if signature is None else ["--", "signature", "signed"]
        words = ["gpgv", "--quiet", "--status-fd", "1", "--homedir", WORK, "--keyring", f"{WORK}/keys", *what]
        done = run_confined(host, scratch, words, check=False)
        status = done.stdout.decode(errors="replace")
        if "[GNUPG:]" not in status:
            raise HostError(
                f"gpgv did not run: {done.stderr.strip()[-200:]}", hint="install the packages gpgv and bubblewrap"
            )
        signers = _find_signers(status)
        if not signers:
            raise InvalidSpec(f"the signature is not good: {_explain(status)}", hint=_HINT)
        if fingerprints and not signers & set(fingerprints):
            raise InvalidSpec(
                f"the signature is by {', '.join(sorted(signers))}, not by {' or '.join(fingerprints)}", hint=_HINT
            )
        return signed if signature is not None else call(files.read_file, scratch / "output")
    finally:
        call(files.remove, scratch)


_HINT = "do not use it: tell whoever publishes it, or try another mirror; --insecure goes without"


def remove_armour(content: bytes) -> bytes:
    """OpenPGP packets without their ASCII armour (RFC 9580, 6.2), which gpgv does not read in a key ring."""
    blocks = _ARMOUR.findall(content)
    if not blocks:
        return content
    packets = b""
    for block in blocks:
        # Headers end at an empty line; the line that begins with `=` is a checksum of 24 bits.
        _headers, _, body = block.replace(b"\r\n", b"\n").rpartition(b"\n\n")
        lines = [line for line in body.split(b"\n") if not line.startswith(b"=")]
        try:
            packets += base64.b64decode(b"".join(lines), validate=True)
        except binascii.Error as error:
            raise InvalidSpec("the key ring is damaged", hint="get it again") from error
    return packets


def _find_signers(status: str) -> set[str]:
    """The primary keys of all good signatures; none when any is bad. Of keys that we do not have there may be more."""
    signatures = status.split("[GNUPG:] NEWSIG")[1:]
    if any("[GNUPG:] BADSIG" in one for one in signatures):
        return set()
    good = [one for one in signatures if "[GNUPG:] GOODSIG " in one]  # VALIDSIG alone is said of expired keys, too
    return {primary for one in good for primary in _VALID.findall(one)}


def _explain(status: str) -> str:
    for word, reason in _REASONS:
        if re.search(rf"^\[GNUPG:\] {word}\b", status, re.MULTILINE):
            return reason
    return "gpgv cannot make anything of it"
