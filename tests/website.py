"""A web server on loopback that behaves, and misbehaves, as a test wants: ranges, redirects, cut and stalled answers."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.server
import ipaddress
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Asked:
    """One request, and what came of it."""

    path: str
    range: str
    status: int = 0
    sent_bytes: int = 0


@dataclass
class Site:
    """What is served, and how."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    has_ranges: bool = True
    has_tags: bool = True
    has_length: bool = True
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Path -> after how many bytes the connection is closed, for one request after the other."""
    holds: dict[str, int] = field(default_factory=dict)
    """Path -> after how many bytes nothing more comes until `go_on` is set."""
    go_on: threading.Event = field(default_factory=threading.Event)
    is_held: threading.Event = field(default_factory=threading.Event)
    has_odd_ranges: bool = False
    """Whether a part that is asked for is answered with the whole, called the part from byte 0."""
    failures: list[int] = field(default_factory=list)
    """Statuses that the next requests get instead."""

    def of(self, path: str) -> list[Asked]:
        return [one for one in self.asked if one.path == path]

    def url(self, path: str) -> str:
        return f"{self.address}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_words: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, path = self.site, self.path
        asked = Asked(path, self.headers.get("Range", ""))
        site.asked.append(asked)
        if site.failures:
            self._answer(asked, site.failures.pop(0), b"")
        elif path in site.redirects:
            self._answer(asked, 302, b"", {"Location": site.redirects[path]})
        elif path not in site.files:
            self._answer(asked, 404, b"")
        else:
            self._serve(asked, site.files[path])

    def _serve(self, asked: Asked, content: bytes) -> None:
        site = self.site
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"ETag": tag} if site.has_tags else {}
        match = re.fullmatch(r"bytes=(\d+)-", asked.range)
        if match and site.has_ranges and self.headers.get("If-Range", tag) == tag:
            start = 0 if site.has_odd_ranges else int(match.group(1))
            if start >= len(content):
                self._answer(asked, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(asked, 206, content[start:], headers)
        else:
            self._answer(asked, 200, content, headers)

    def _answer(self, asked: Asked, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        site = self.site
        asked.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if site.has_length or status not in (200, 206):
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        cut = site.cuts[asked.path].pop(0) if site.cuts.get(asked.path) else len(body)
        first = int(re.findall(r"bytes (\d+)-", (headers or {}).get("Content-Range", "")[:40] + " bytes 0-")[0])
        hold = site.holds.get(asked.path, first + len(body))
        with contextlib.suppress(OSError):
            for start in range(0, min(cut, len(body)), 16384):
                if first + start >= hold and not site.go_on.is_set():
                    self.wfile.flush()
                    site.is_held.set()
                    site.go_on.wait(30)
                piece = body[start : min(start + 16384, cut)]
                asked.sent_bytes += len(piece)  # before whoever gets it can look
                self.wfile.write(piece)


@contextlib.contextmanager
def serve(tls: tuple[Path, Path] | None = None) -> Iterator[Site]:
    """A site at a port of its own; `tls`: files of a certificate and its key."""
    site = Site()
    handler = type("Handler", (_Handler,), {"site": site})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    site.address = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
