"""One transfer over HTTP or HTTPS into a file, continued where an earlier one ended (RFC 9110, 13.1.5 and 14).

Standard library only. A connection that breaks is taken up again; a server that sends nothing, too slowly, or too much is
left. Beside the file lie notes on which version of the resource its bytes are of: without such a validator, or with
another, everything is fetched anew. Proxies are taken from the environment (`http_proxy`, `https_proxy`, `no_proxy`).
"""

from __future__ import annotations

import errno
import hashlib
import http
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hvctl.hostside import files
from hvctl.values import dataclass

if TYPE_CHECKING:
    import email.message

_CHUNK_BYTES = 256 * 1024
_TRIES = 4
_PAUSE_S = 0.5
# Slower than this for two stall times is as good as not coming.
_LEAST_BYTES_PER_S = 512
_ADDRESS = re.compile(r"https?://[!-~]{1,2000}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18})", re.ASCII)


class DownloadError(Exception):
    """Why nothing came, in words; `path` and `address` are for whoever raises it further to add."""


class Missing(DownloadError):
    """The server says that there is no such thing."""


class Refused(DownloadError):
    """It must not be fetched from there, or not this much of it: trying again changes nothing."""


class Stalled(DownloadError):
    """The server sends nothing any more."""


class Broken(DownloadError):
    """The connection cannot be made, or broke again and again."""


@dataclass(frozen=True)
class Transfer:
    """What is fetched, and where to."""

    address: str
    path: Path
    """Its bytes; made private (0600)."""
    limit_bytes: int
    stall_s: float
    """How long nothing may come."""

    @property
    def notes(self) -> Path:
        return self.path.with_suffix(".json")


@dataclass
class Received:
    """What is in the file: its size and digests."""

    size_bytes: int = 0
    _sha256: Any = field(default_factory=hashlib.sha256)
    _sha512: Any = field(default_factory=hashlib.sha512)

    def add(self, content: bytes) -> None:
        self.size_bytes += len(content)
        self._sha256.update(content)
        self._sha512.update(content)

    @property
    def sha256(self) -> str:
        digest: str = self._sha256.hexdigest()
        return digest

    @property
    def sha512(self) -> str:
        digest: str = self._sha512.hexdigest()
        return digest


Tell = Callable[[int, int], None]
"""Bytes that are there, and how many there will be (0: the server does not say)."""
Pause = Callable[[float], None]


def check_address(address: str) -> None:
    """Raise Refused for what is no plain address of a web server."""
    parts = urllib.parse.urlsplit(address) if _ADDRESS.fullmatch(address) else None
    if parts is None or not parts.hostname:
        raise Refused("it is no address that begins with https:// or http://")
    if "@" in parts.netloc:
        raise Refused("it has a name or password in it")


def fetch(transfer: Transfer, tell: Tell, pause: Pause) -> Received:
    """Fetch all of it, from where the file ends; returns once every byte is on the disk.

    The file and its notes stay when this fails, for the next time, but for a full disk. Raises DownloadError, OSError.
    """
    check_address(transfer.address)
    try:
        with _open(transfer.path) as stream:
            download = _Download(transfer, stream, tell)
            failures, most_bytes = 0, download.received.size_bytes
            while True:
                try:
                    download.go_on()
                    stream.flush()
                    os.fsync(stream.fileno())
                    return download.received
                except (Stalled, Broken):
                    failures = 1 if download.received.size_bytes > most_bytes else failures + 1
                    most_bytes = max(most_bytes, download.received.size_bytes)
                    if failures >= _TRIES:
                        raise
                    pause(_PAUSE_S * 2**failures)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            discard(transfer.path)
        raise


def discard(path: Path) -> None:
    """Remove what has come of an address."""
    for name in (path, path.with_suffix(".json")):
        files.remove(name)


def hash_file(path: Path, tell: Tell) -> Received:
    """Size and digests of a file that is here already."""
    with path.open("rb") as stream:
        return _measure(stream, tell)


class _Download:
    """A file on its way: what is in it, and the requests that make it whole."""

    def __init__(self, transfer: Transfer, stream: IO[bytes], tell: Tell) -> None:
        self.transfer = transfer
        self.stream = stream
        self.tell = tell
        self.received = _measure(stream, tell)

    def go_on(self) -> None:
        """One request, for what is missing. Raises Stalled or Broken when that may help another time."""
        validator = self._read_validator() if self.received.size_bytes else ""
        if not validator:
            self._start_over()
        # Here: TLS and HTTP cost 25 ms, and who lists or imports files has no use for them.
        from hvctl.hostside import web

        with web.translated(self.transfer.stall_s):
            try:
                answer = web.ask(self.transfer.address, self._headers(validator), timeout_s=self.transfer.stall_s)
            except web.HTTPError as error:
                if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and validator:
                    if _parse_range(error.headers)[1] == self.received.size_bytes:
                        return  # it was whole already
                    self._start_over()
                    raise Broken("it has changed on the server") from error
                raise
            with answer:
                self._take(answer)

    def _headers(self, validator: str) -> dict[str, str]:
        headers = {"User-Agent": "hvctl", "Accept-Encoding": "identity", "Accept": "*/*"}
        if validator:
            headers |= {"Range": f"bytes={self.received.size_bytes}-", "If-Range": validator}
        return headers

    def _take(self, answer: Any) -> None:
        """The body of an answer, behind what is there or, when it is the whole, in its place."""
        if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
            start, total = _parse_range(answer.headers)
            if start != self.received.size_bytes:
                self._start_over()
                raise Broken("the server sent another part than it was asked for")
        else:
            self._start_over()
            total = answer.length or 0
            self._write_validator(answer.headers)
        self._check_size(total)
        self._copy(answer, total)
        if total and self.received.size_bytes != total:
            raise Broken(f"the connection ended after {self.received.size_bytes} of {total} bytes")

    def _copy(self, answer: Any, total: int) -> None:
        began_s, came_bytes = time.monotonic(), 0
        while content := answer.read1(_CHUNK_BYTES):
            self.stream.write(content)
            self.received.add(content)
            self._check_size(self.received.size_bytes)
            self.tell(self.received.size_bytes, total)
            came_bytes += len(content)
            elapsed_s = time.monotonic() - began_s
            if elapsed_s > 2 * self.transfer.stall_s:
                if came_bytes < _LEAST_BYTES_PER_S * elapsed_s:
                    raise Stalled(f"only {came_bytes} bytes came in {elapsed_s:.0f} s")
                began_s, came_bytes = time.monotonic(), 0

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.transfer.limit_bytes:
            discard(self.transfer.path)
            raise Refused(f"it is larger than {self.transfer.limit_bytes} bytes")

    def _start_over(self) -> None:
        self.stream.seek(0)
        self.stream.truncate()
        self.received = Received()
        files.remove(self.transfer.notes)

    def _read_validator(self) -> str:
        """What the server called the version whose bytes are there; empty: none can be gone on with."""
        try:
            noted = json.loads(files.read_file(self.transfer.notes, limit_bytes=64 * 1024))
            known = noted["address"] == self.transfer.address
            return str(noted["validator"]) if known else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _write_validator(self, headers: email.message.Message) -> None:
        """A strong entity tag, else the date (RFC 9110, 13.1.5: a weak tag will not do)."""
        tag = str(headers.get("ETag") or "")
        validator = tag if tag.startswith('"') else str(headers.get("Last-Modified") or "")
        noted = {"address": self.transfer.address, "validator": validator}
        files.write_file(self.transfer.notes, json.dumps(noted).encode(), 0o600)


def _parse_range(headers: email.message.Message) -> tuple[int, int]:
    """First byte (-1 where there is none) and size of the whole, from Content-Range; (-1, -1) for nonsense."""
    match = _CONTENT_RANGE.fullmatch(str(headers.get("Content-Range") or ""))
    return (int(match.group(1) or -1), int(match.group(2))) if match else (-1, -1)


def _open(path: Path) -> IO[bytes]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "r+b")


def _measure(stream: IO[bytes], tell: Tell) -> Received:
    """Read a file from its beginning to its end."""
    received, total = Received(), os.fstat(stream.fileno()).st_size
    stream.seek(0)
    while content := stream.read(_CHUNK_BYTES):
        received.add(content)
        tell(received.size_bytes, total)
    return received
