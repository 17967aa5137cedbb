"""What tells one instance from another: name, MAC, interface, ssh host key, and the public keys that may log in."""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import field

from hvctl.errors import InvalidSpec
from hvctl.values import dataclass

# A DNS label (RFC 1123) in lower case that begins with a letter: it is a host name, a file name and an XML text.
_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_KEY_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
# How a file of one private key without a passphrase begins (OpenSSH's PROTOCOL.key): cipher, key derivation, its parameters.
_PRIVATE_BEGIN = b"openssh-key-v1\0" + b"\0\0\0\4none" * 2 + b"\0\0\0\0" + b"\0\0\0\1"
_PRIVATE_LINES = (b"-----BEGIN OPENSSH PRIVATE KEY-----", b"-----END OPENSSH PRIVATE KEY-----")


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """An ed25519 key pair: the private half in OpenSSH's format, the public one as `ssh-ed25519 AAAA...`."""

    private: bytes = field(repr=False)
    public: str


def check_name(name: str) -> str:
    """The name, if an instance may have it. Raises InvalidSpec."""
    if not _NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} cannot be a name",
            hint="use 1 to 63 lower-case letters, digits and hyphens, beginning with a letter, not ending with a hyphen",
        )
    return name


def new_mac() -> str:
    """A random unicast, locally administered MAC address: 0x52 and 40 random bits."""
    return ":".join(f"{byte:02x}" for byte in (0x52, *os.urandom(5)))


def check_public_key(line: str) -> str:
    """One public key line as it goes into authorized_keys: `TYPE BASE64 [COMMENT]`, without options.

    Raises InvalidSpec when the type is unknown, the data is not a key of that type, or there is a control character.
    """
    words = line.strip().split(" ", 2)
    if len(words) < 2 or not line.strip().isprintable() or words[0] not in _KEY_TYPES:
        raise InvalidSpec(
            f"{line[:60]!r} is not a public ssh key", hint="give a line or file like ~/.ssh/id_ed25519.pub"
        )
    try:
        data = base64.b64decode(words[1], validate=True)
    except binascii.Error as error:
        raise InvalidSpec(f"the public key {line[:60]!r} is damaged: {error}", hint="copy it again, whole") from error
    length = int.from_bytes(data[:4], "big")  # RFC 4253, 6.6: the type again, length-prefixed
    if data[4 : 4 + length] != words[0].encode() or len(data) <= 4 + length:
        raise InvalidSpec(f"the public key {line[:60]!r} is damaged", hint="copy it again, whole")
    return " ".join(words)


def public_of(private: bytes) -> str:
    """The public line of an ed25519 key in OpenSSH's private format, without a passphrase (its PROTOCOL.key).

    Raises InvalidSpec for anything else, and where the two halves are not whole or not of one key.
    """
    try:
        begin, *lines, end = private.strip().splitlines()
        data = base64.b64decode(b"".join(lines), validate=True)
        public, section = _read_strings(data.removeprefix(_PRIVATE_BEGIN), 2)
        check, check_again = section[:4], section[4:8]
        kind, point, secret = _read_strings(section[8:], 3)  # a comment and padding follow
        is_whole = (
            (begin, end) == _PRIVATE_LINES
            and data.startswith(_PRIVATE_BEGIN)
            and kind == b"ssh-ed25519"
            and _read_strings(public, 2) == [kind, point]
            and check == check_again
            and (len(secret), secret[32:]) == (64, point)
        )
    except ValueError:  # cut off somewhere
        is_whole = False
    if not is_whole:
        raise InvalidSpec("this is no private ssh key, or not a whole one", hint="make one: ssh-keygen -t ed25519")
    return f"ssh-ed25519 {base64.b64encode(public).decode()}"


def _read_strings(data: bytes, count: int) -> list[bytes]:
    """So many length-prefixed strings (RFC 4251, 5). Raises ValueError for one that is cut off."""
    found, at = [], 0
    for _string in range(count):
        size = int.from_bytes(data[at : at + 4], "big")
        at += 4 + size
        if at > len(data) or at < 4 + size:
            raise ValueError("cut off")
        found.append(data[at - size : at])
    return found
