"""A file from elsewhere as a half of an image: a disk, or a root tree. What it is, its content says, not its name.

Everything is read by confined workers (`rootfs/intake.py`); the disk becomes a clean qcow2 file, the tree a directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hvctl.errors import InvalidSpec
from hvctl.events import Progress
from hvctl.hostside import expand, files, plaindisk, refusal, sandbox
from hvctl.model import Disk, Firmware, Image, Provision
from hvctl.rootfs import confined, intake
from hvctl.rootfs.building import Building
from hvctl.rootfs.intake import Limits
from hvctl.units import now
from hvctl.values import dataclass

_HEAD_BYTES = 64 * 1024
_ELF_MACHINE = {
    0x3E: "x86_64",
    0x03: "i686",
    0xB7: "aarch64",
    0x28: "arm",
    0xF3: "riscv64",
    0x15: "ppc64",
    0x16: "s390x",
}
_RUN_HERE = ("x86_64", "i686")
_PROGRAM_BYTES = 64 * 1024**2
_WORD = re.compile(r"[a-z0-9._-]{1,40}", re.ASCII)
# A whole system has one of them; what has none is the root of an application.
_INITS = ("sbin/init", "usr/sbin/init", "lib/systemd/systemd", "usr/lib/systemd/systemd")


@dataclass(frozen=True, kw_only=True)
class Described:
    """What whoever offers an image says of it; empty where nobody does."""

    source: str
    origin: str
    """The digest of all that was fetched for it."""
    os: str = ""
    version: str = ""
    login_user: str = ""
    firmware: Firmware = Firmware.BIOS
    format: str = ""
    """The disk's: `qcow2` or `raw`."""

    def as_image(self, name: str) -> Image:
        """The image as far as it is known before anything was brought here."""
        return Image(
            id="",
            name=name,
            os=self.os or "unknown",
            version=self.version,
            architecture="x86_64",
            created_at=now(),
            login_user=self.login_user or "root",
            provision=Provision.NOCLOUD,
            disk=None,
            kernel=None,
            initrd=None,
            firmware=self.firmware,
            source=self.source,
            origin=self.origin,
        )


def take_in(work: Building, path: Path, described: Described, find_sha256: Callable[[], str]) -> Image:
    """The image that one file makes, a disk's or a tree's. Raises InvalidSpec for what is neither, or is refused.

    `find_sha256` gives the file's digest; it is asked for last.
    """
    path = _readable(work, path)
    head = path.open("rb").read(_HEAD_BYTES)
    compression = expand.identify(head)
    if plaindisk.is_tar(head) or compression == "squashfs":
        return replace(add_tree(work, path, described), tree_digest=f"sha256:{find_sha256()}")
    if compression:
        disk = work.directory / "expanded"
        if _expand(work, path, disk) == "tar":
            return replace(add_tree(work, path, described), tree_digest=f"sha256:{find_sha256()}")
        path, head = disk, disk.open("rb").read(_HEAD_BYTES)
    if not described.format and not _is_disk(head):
        raise InvalidSpec(
            f"{work.name!r} cannot be made: {described.source[:200]!r} is neither a disk nor the archive of a root tree",
            hint="where it is a raw disk without a partition table, say so: --format raw",
        )
    return add_disk(work, path, described)


def add_disk(work: Building, path: Path, described: Described) -> Image:
    """The image with the disk that this file is. Raises InvalidSpec, HostError."""
    target = work.image / "disk.qcow2"
    facts = intake.convert_disk(work.host, path, target, format=described.format, events=work.events, subject=work.name)
    artefact = work.artefact(target)
    image = described.as_image(work.name)
    disk = Disk(artefact=artefact, format=facts.format, virtual_bytes=facts.virtual_bytes)
    return replace(image, disk=disk)


def add_tree(work: Building, path: Path, described: Described, digest: str = "") -> Image:
    """The image with the root tree that this archive holds. Raises InvalidSpec when it is none, or not for this machine."""
    call = work.host.shell.call
    call(files.make_directory, work.rootfs.parent, 0o700)
    intake.unpack_tree(work.host, path, work.rootfs, events=work.events, subject=work.name)
    _check_tree(work)
    os, version = _read_release(work)
    return replace(
        described.as_image(work.name),
        os=described.os or os,
        version=described.version or version,
        provision=_find_provision(work),
        has_tree=True,
        tree_digest=digest,
    )


def _expand(work: Building, path: Path, disk: Path) -> str:
    """Expand a compressed disk; `tar` instead of `disk` when there is an archive in it."""
    limits, size_bytes = Limits(), path.stat().st_size
    scratch = work.directory / "expanding"
    work.host.shell.call(files.make_directory, scratch, 0o700)
    request = plaindisk.Request(
        name=disk.name,
        most_bytes=limits.file_bytes,
        ratio=limits.ratio,
        ratio_floor_bytes=limits.ratio_floor_bytes,
        reserve_bytes=limits.reserve_bytes,
    )
    confinement = sandbox.Confinement(
        directory=scratch,
        read_only=((path, sandbox.place_input(0)),),
        cpu_s=limits.cpu_s,
        memory_bytes=limits.memory_bytes,
        file_bytes=limits.file_bytes,
    )

    def on_line(line: str) -> None:
        done = line.removeprefix(refusal.PROGRESS)
        if done != line and done.isdigit():
            work.host.pause(0)
            work.events(Progress(work.name, "expanding", int(done), size_bytes, is_bytes=True))

    argv = sandbox.python_command(confinement, "plaindisk", [plaindisk.format_request(request)])
    done = work.host.shell.run(argv, timeout_s=limits.wall_s, check=False, on_line=on_line)
    if done.status != 0:
        raise confined.explain(done, f"cannot expand {path.name[:100]!r}", limits)
    kind = done.stdout.decode(errors="replace")
    if kind == "disk":
        work.host.shell.call(files.publish, scratch / disk.name, disk)
    return kind


def _readable(work: Building, path: Path) -> Path:
    """The file, or a copy of it where only its owner, who is not root, may read it: the workers have no privilege."""
    facts = path.stat()
    if facts.st_uid == 0 or facts.st_mode & 0o004:
        return path
    copy = work.directory / "copy"
    work.host.shell.call(files.clone_file, path, copy, 0o600)
    return copy


def _is_disk(head: bytes) -> bool:
    """A qcow2 file, or the boot sector that a partition table of either kind begins with."""
    return head.startswith(b"QFI\xfb") or head[510:512] == b"\x55\xaa"


def _check_tree(work: Building) -> None:
    """Raise InvalidSpec for a tree that is no whole system, or one of another kind of machine."""
    found = [_read(work, name, _PROGRAM_BYTES) for name in _INITS]
    init = next((content for content in found if content is not None), None)
    if init is None:
        raise InvalidSpec(
            f"{work.name!r} cannot be made: there is no /sbin/init in the tree, so it is no whole system",
            hint="an application's image comes as docker://NAME, oci:DIR or docker-archive:FILE: hvctl image pull --help",
        )
    machine = _ELF_MACHINE.get(int.from_bytes(init[18:20], "little"), "unknown") if init[:4] == b"\x7fELF" else ""
    if machine and machine not in _RUN_HERE:
        raise InvalidSpec(
            f"{work.name!r} cannot be made: its programs are for {machine}", hint="get the one for x86_64 (amd64)"
        )


def _find_provision(work: Building) -> Provision:
    """How the system in the tree learns its name and keys: hvctl's own way, cloud-init, or not at all."""
    if _read(work, "usr/lib/hvctl/identity") is not None:
        return Provision.CREDENTIALS
    return Provision.NONE if _read(work, "usr/bin/cloud-init") is None else Provision.NOCLOUD


def _read_release(work: Building) -> tuple[str, str]:
    """ID and VERSION_ID of os-release(5), where they are plain words."""
    content = _read(work, "etc/os-release") or _read(work, "usr/lib/os-release") or b""
    values = {}
    for line in content.decode(errors="replace").splitlines():
        key, _, value = line.partition("=")
        values[key] = value.strip().strip("\"'")
    words = [values.get(key, "") for key in ("ID", "VERSION_ID")]
    os, version = (word if _WORD.fullmatch(word) else "" for word in words)
    return os or "unknown", version


def _read(work: Building, name: str, limit_bytes: int = 1024**2) -> bytes | None:
    return intake.read_in_tree(work.host, work.rootfs, name, limit_bytes=limit_bytes)
