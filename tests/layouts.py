"""OCI image layouts, written by code: layers with whiteouts, hard links and attributes on a static busybox."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_APPLETS = ("sh", "cat", "echo", "env", "id", "ls", "ps", "pwd", "sleep", "stat", "true", "uname", "head", "nslookup",
            "find", "sort", "sha256sum", "readlink", "printf", "dd", "yes", "kill", "wget", "test", "xargs", "cut",
            "hostname", "ip", "grep", "sed", "tr", "rm", "mkdir", "wc", "httpd", "setsid")  # fmt: skip
PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1234:2345:App:/home/app:/bin/sh\n"
GROUP = "root:x:0:\napps:x:2345:\nextra:x:3456:app\n"


@dataclass(frozen=True)
class Entry:
    """One member of a layer: a symbolic link with `link`, a hard one with `hard`, else a file, or without data a directory."""

    name: str
    data: bytes | None = None
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    link: str = ""
    hard: str = ""
    attributes: tuple[tuple[str, str], ...] = ()


def folder(name: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(name, None, mode, uid, gid)


def base() -> list[Entry]:
    """A root that can run shell scripts, as a layer."""
    busybox = Path("/bin/busybox").read_bytes()
    return [
        *(folder(name) for name in ("bin", "etc", "home", "root", "srv", "var")),
        folder("tmp", 0o1777),
        folder("home/app", 0o750, 1234, 2345),
        Entry("bin/busybox", busybox, 0o755),
        *(Entry(f"bin/{name}", link="busybox") for name in _APPLETS),
        Entry("etc/passwd", PASSWD.encode()),
        Entry("etc/group", GROUP.encode()),
    ]


def changes() -> list[list[Entry]]:
    """Two more layers that add, link, hide and replace."""
    first = [
        *(folder(f"srv/{name}") for name in ("gone", "opaque", "kept")),
        *(Entry(f"srv/{name}/old", name.encode()) for name in ("gone", "opaque", "kept")),
        Entry("srv/hidden", b"hidden"),
        Entry("srv/one", b"twice", 0o640, 1234, 2345),
        Entry("srv/two", hard="srv/one"),
        Entry("srv/marked", b"marked", 0o4755, attributes=(("user.colour", "blue"),)),
        Entry("srv/pointer", link="../etc/passwd"),
    ]
    second = [
        Entry("srv/.wh.gone", b""),
        Entry("srv/.wh.hidden", b""),
        folder("srv/opaque"),
        Entry("srv/opaque/.wh..wh..opq", b""),
        Entry("srv/opaque/new", b"new"),
        Entry("srv/kept/more", b"more"),
        Entry("srv/three", hard="srv/two"),
    ]
    return [first, second]


def write(folder_: Path, layers: Sequence[Sequence[Entry]], config: Mapping[str, Any], *, tag: str = "latest") -> Path:
    """Write an image layout; the folder."""
    (folder_ / "blobs" / "sha256").mkdir(parents=True)
    descriptors, diff_ids = [], []
    for layer in layers:
        archive = _pack(layer)
        diff_ids.append("sha256:" + hashlib.sha256(archive).hexdigest())
        descriptors.append(
            add_blob(folder_, gzip.compress(archive, 1, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")
        )
    whole = {
        "created": "2026-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    configuration = add_blob(folder_, json.dumps(whole).encode(), "application/vnd.oci.image.config.v1+json")
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": configuration, "layers": descriptors}
    described = add_blob(folder_, json.dumps(manifest).encode(), kind)
    named = {**described, "annotations": {"org.opencontainers.image.ref.name": tag}}
    (folder_ / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (folder_ / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder_


def add_blob(folder_: Path, content: bytes, media: str) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    (folder_ / "blobs" / "sha256" / digest).write_bytes(content)
    return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(content)}


def _pack(layer: Sequence[Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in layer:
            member = tarfile.TarInfo(entry.name)
            member.mode, member.uid, member.gid, member.mtime = entry.mode, entry.uid, entry.gid, 1_700_000_000
            member.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in entry.attributes}
            if entry.link:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
            elif entry.hard:
                member.type, member.linkname = tarfile.LNKTYPE, entry.hard
            elif entry.data is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(entry.data)
            archive.addfile(member, io.BytesIO(entry.data) if entry.data else None)
    return buffer.getvalue()
