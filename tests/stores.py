"""A store of a test's own that no libvirt knows, and what may be put into it."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from hvctl.config import Config
from hvctl.host import Host
from hvctl.units import MIB

NO_LIBVIRT = "test:///default"


def make(folder: Path) -> Host:
    """A host with an empty store and run directory below `folder`."""
    settings = Config(
        store=folder / "store", run=folder / "run", vm_uri=NO_LIBVIRT, container_uri=NO_LIBVIRT, network="none"
    )
    host = Host(settings)
    store = host.store
    for path in (store.root, store.run, store.images, store.tags, store.layers, store.instances, store.building):
        path.mkdir(mode=0o711)
    store.locks.mkdir()
    return host


def content(host: Host) -> list[str]:
    """What a failed or killed pull must have left as it was: everything but downloads."""
    names = [str(path.relative_to(host.store.root)) for path in host.store.root.rglob("*")]
    return sorted(name for name in names if not name.startswith("downloads"))


def make_disk(folder: Path, name: str = "disk.qcow2", size_bytes: int = 8 * MIB) -> Path:
    """A qcow2 file with a boot sector and a megabyte of noise."""
    raw, disk = folder / f"{name}.raw", folder / name
    with raw.open("wb") as stream:
        stream.write(bytes(510) + b"\x55\xaa" + os.urandom(1 * MIB))
        stream.truncate(size_bytes)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)]
    subprocess.run(convert, check=True, timeout=60)
    return disk


def make_tree(files: Mapping[str, bytes], *, mode: str = "w:gz") -> bytes:
    """The archive of a root tree with these files and what every system has."""
    buffer = io.BytesIO()
    system = {"etc/os-release": b'ID=tiny\nVERSION_ID="3"\n', "sbin/init": b"#!/bin/sh\n", "bin/sh": b"#!\n"}
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, body in {**system, **files}.items():
            if body is not None:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(body), 0o755
                archive.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()
