"""An image of a few hundred kilobytes that is complete in every way but has nothing to boot."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from hvctl.host import Host
from hvctl.model import Artefact, Disk, Image, Provision, Spec
from hvctl.model import Mode as _Mode
from hvctl.rootfs import manifest
from hvctl.units import MIB

DISK_BYTES = 1 * MIB


def publish(host: Host, name: str, *, disk: Path | None = None) -> str:
    """Put it into the store under this name; `disk`: a raw disk with something on it, in the place of an empty one."""
    folder = host.store.images / "tiny-in-the-making"
    folder.mkdir(mode=0o711)
    (folder / "vmlinuz").write_bytes(b"no kernel\n" * 1000)
    (folder / "initrd").write_bytes(b"no initrd\n" * 1000)
    words = ["qemu-img", "create", "-q", "-f", "qcow2", str(folder / "disk.qcow2"), str(DISK_BYTES)]
    if disk is not None:
        words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(folder / "disk.qcow2")]
    subprocess.run(words, check=True, timeout=30)
    for path in (folder / "tree", folder / "tree" / "rootfs"):
        path.mkdir(mode=0o700)
    image = manifest.seal(
        Image(
            id="",
            name=name,
            os="none",
            version="0",
            architecture="x86_64",
            created_at="2026-01-01T00:00:00Z",
            login_user="root",
            provision=Provision.CREDENTIALS,
            disk=Disk(
                artefact=_artefact(folder / "disk.qcow2"),
                format="qcow2",
                virtual_bytes=disk.stat().st_size if disk else DISK_BYTES,
            ),
            kernel=_artefact(folder / "vmlinuz"),
            initrd=_artefact(folder / "initrd"),
            kernel_arguments=("root=/dev/vda",),
            kernel_release="0",
            has_tree=True,
        )
    )
    (folder / "manifest.json").write_bytes(manifest.format_manifest(image))
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o444)
    folder.rename(host.store.image(image.id))
    (host.store.tags / name).write_text(f"{image.id}\n")
    return name


def make_spec(name: str, mode: _Mode = _Mode.VM, image: str = "tiny") -> Spec:
    """A small instance of it."""
    return Spec(name=name, mode=mode, image=image, cpus=1, memory_bytes=128 * MIB)


def _artefact(path: Path) -> Artefact:
    content = path.read_bytes()
    return Artefact(file=path.name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJ5dGVzIG9mIG5vIGtleSBhdCBhbGwsIGp1c3QgMzI= nobody"
