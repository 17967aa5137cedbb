"""An OCI image layout, made by hand from layers."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

from hvctl.rootfs.intake import Layer
from tests.tarballs import entry, long_name, pax, tar

_CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw+ep, version 2

_DIRECTORIES = ("usr/", "usr/bin/", "usr/lib/", "etc/", "var/", "var/cache/", "opt/", "opt/a/", "home/")


def write(folder: Path, tag: str, archives: list[bytes]) -> list[Layer]:
    """Write an image of these tar archives; gives its layers."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes, media: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(content)}

    media = "application/vnd.oci.image.layer.v1.tar+gzip"
    layers = [put(gzip.compress(archive, 1), media) for archive in archives]
    diff_ids = [f"sha256:{hashlib.sha256(archive).hexdigest()}" for archive in archives]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    }
    named = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    named["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return [
        Layer(path=blobs / str(layer["digest"])[7:], media=media, digest=str(layer["digest"]), diff_id=diff_id)
        for layer, diff_id in zip(layers, diff_ids, strict=True)
    ]


def make_layers() -> list[bytes]:
    """Layers that do to one another all that layers can do."""
    root = entry("./", "5", mode=b"0000755\0", mtime=b"%011o\0" % 1_600_000_000)
    base = tar(
        root,
        *(entry(name, "5", mode=b"0000755\0", mtime=b"%011o\0" % (1_500_000_000 + number))
          for number, name in enumerate(_DIRECTORIES)),
        entry("bin", "2", link="usr/bin"),
        entry("lib", "2", link="/usr/lib"),
        entry("usr/bin/sudo", content=b"#!", mode=b"0004755\0"),
        entry("usr/bin/write", content=b"w", mode=b"0002755\0", gid=b"0000005\0"),
        pax(("SCHILY.xattr.security.capability", _CAPABILITY), ("mtime", "1500000000.123456789")),
        entry("usr/bin/ping", content=b"ping", mode=b"0000755\0"),
        pax(("SCHILY.xattr.user.note", b"kept\0\xff"), ("SCHILY.xattr.user.empty", b"e")),
        entry("etc/noted", content=b"n", uid=b"0001750\0", gid=b"0001750\0"),
        pax(("SCHILY.xattr.user.directory", b"yes")),
        entry("etc/noted.d", "5", mode=b"0001777\0"),
        entry("etc/passwd", content=b"root:x:0:0\n"),
        entry("etc/shadow", content=b"secret", mode=b"0000640\0", gid=b"0000052\0"),
        entry("etc/mtab", "2", link="../proc/self/mounts", uid=b"0000144\0"),
        entry("var/cache/one", content=b"1" * 5000),
        entry("var/cache/two", content=b"2" * 700),
        entry("opt/a/file", content=b"a"),
        entry("opt/a/more", content=b"b"),
        entry("opt/hard", "1", link="opt/a/file"),
        entry("opt/harder", "1", link="etc/mtab"),
        pax(("uid", "1879048192"), ("gid", "4000000000")),
        entry("home/far", content=b"far"),
        entry("var/pipe", "6"),
        long_name("opt/" + "long/" * 30 + "x"),
        entry("short", content=b"long name"),
        pax(("path", "opt/f\u00f6\u00f6 bar\nnewline")),
        entry("plain", content=b"odd name"),
        # Said again: umoci gives it another time when it makes a directory in it that no entry names.
        entry("opt/", "5", mode=b"0000755\0", mtime=b"%011o\0" % 1_500_000_006),
    )  # fmt: skip
    return [
        base,
        # Files changed, added, removed; a link in the way; a hard link to a lower layer.
        tar(
            entry("usr/bin/sudo", content=b"#! new", mode=b"0000755\0", mtime=b"%011o\0" % 1_700_000_000),
            entry("bin/added", content=b"through the link"),
            entry("etc/.wh.shadow"),
            entry("etc/passwd.old", "1", link="etc/passwd"),
            entry("var/cache/.wh.one"),
            entry("etc", "5", mode=b"0000700\0", uid=b"0000001\0"),
        ),
        # A directory emptied by its opaque mark, and filled; before and after the mark.
        tar(
            entry("opt/a/before", content=b"stays"),
            entry("opt/a/.wh..wh..opq"),
            entry("opt/a/after", content=b"stays"),
            entry("etc/noted.d", "5", mode=b"0000755\0"),
        ),
        # Directory by file, file by directory, link by directory, directory by link.
        tar(
            entry("var/cache", content=b"a file now"),
            entry("etc/noted", "5", mode=b"0000750\0"),
            entry("etc/noted/in", content=b"it"),
            entry("lib", "5", mode=b"0000755\0"),
            entry("lib/real", content=b"real"),
            entry("home", "2", link="var"),
        ),
        # Removed and made again in one layer, and a whole directory removed.
        tar(entry(".wh.opt"), entry("etc/.wh.passwd"), entry("etc/passwd", content=b"new"), entry("home/through", content=b"t")),
        tar(entry("opt", "5", mode=b"0000711\0"), entry("opt/again", content=b"x"), entry("new/deep/er/file", content=b"i")),
        tar(entry("new", "5"), entry("new/deep", "5"), entry("new/deep/er", "5"), entry("new/deep/er/.wh.nothing")),
        tar(),
    ]  # fmt: skip
