"""A store of a test's own that no libvirt knows, and what may be put into it."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import HvctlError, InvalidSpec
from hvctl.events import Event, Note
from hvctl.host import Host
from hvctl.model import Image
from hvctl.rootfs import sources
from hvctl.rootfs.sources import Wanted
from hvctl.store import Store
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


def lend(lender: Path, borrower: Store, name: str) -> str:
    """Put an image of one store into another, too, without copying it; its name."""
    identifier = (lender / "tags" / name).read_text().strip()
    words = ["cp", "--archive", "--link", str(lender / "images" / identifier), str(borrower.image(identifier))]
    subprocess.run(words, check=True, timeout=300)
    (borrower.tags / name).write_text(f"{identifier}\n")
    return name


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


def make_busybox_tree() -> bytes:
    """The archive of a root tree like Alpine's: busybox alone, its init, no sshd, no cloud-init, nothing for the network."""
    busybox = Path("/usr/bin/busybox").read_bytes()
    programs = subprocess.run(["/usr/bin/busybox", "--list"], capture_output=True, text=True, check=True, timeout=30)
    inittab = b"::sysinit:/bin/echo hello from inittab\n::ctrlaltdel:/sbin/reboot\n::shutdown:/bin/touch /was-asked\n"
    files = {
        "bin/busybox": busybox,
        "etc/inittab": inittab,
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
        "etc/os-release": b'ID=alike\nVERSION_ID="3.1"\n',
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name in ("bin", "sbin", "etc", "dev", "proc", "sys", "run", "tmp", "root", "var"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(body), 0o755
            archive.addfile(entry, io.BytesIO(body))
        for name in {*programs.stdout.split(), "init"} - {"busybox"}:
            entry = tarfile.TarInfo("sbin/init" if name == "init" else f"bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/bin/busybox"
            archive.addfile(entry)
    return buffer.getvalue()


def pull(
    host: Host, source: str | Path = "mine", name: str = "got", told: list[Event] | None = None, **options: object
) -> Image:
    wanted = Wanted(name=name, source=str(source), **options)  # type: ignore[arg-type]
    return sources.bring(host, wanted, told.append if told is not None else lambda _event: None)


def notes(told: list[Event]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, Note))


def refuse(
    host: Host, words: str, source: str | Path = "mine", kind: type[HvctlError] = InvalidSpec, **options: object
) -> HvctlError:
    """Pull something that is refused for this reason; nothing has changed then."""
    before = content(host)
    with pytest.raises(kind, match=words) as caught:
        pull(host, source, **options)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message and caught.value.hint
    assert content(host) == before
    return caught.value


def holds(host: Host, image: Image, disk: bytes, tmp_path: Path) -> bool:
    """Whether the image's disk is this one."""
    (tmp_path / "expected").write_bytes(disk)
    words = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(tmp_path / "expected")]
    words.append(str(host.store.image(image.id) / "disk.qcow2"))
    return subprocess.run(words, capture_output=True, check=False, timeout=60).returncode == 0
