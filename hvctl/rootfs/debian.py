"""Debian images: one mmdebstrap run gives the root tree, the root disk, kernel, initrd and manifest.

Built in a private directory of the store, published by one rename; a build that fails or is killed leaves nothing but
that directory, which `hvctl gc` removes once its lock is free.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvctl.errors import CommandFailed, HostError
from hvctl.events import Progress, Sink
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Artefact, Disk, Image, Provision
from hvctl.rootfs import aptconfig, guestfiles, manifest, published
from hvctl.rootfs.request import BuildRequest
from hvctl.shell import Completed
from hvctl.units import GIB, format_size

_BOOTSTRAP_TIMEOUT_S = 3600
_DISK_TIMEOUT_S = 900
_NEEDED_BYTES = 3 * GIB

# On top of mmdebstrap's "minbase" (Essential and apt). busybox-static and xz-utils are for the initrd.
_PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "e2fsprogs", "iproute2", "netbase", "openssh-server"),
    *("linux-image-cloud-amd64", "initramfs-tools", "busybox-static", "xz-utils", "cloud-init", "qemu-guest-agent"),
    *("ca-certificates", "iputils-ping", "less", "procps", "vim-tiny"),
)

# `net.ifnames=0`: the interface is eth0, as it is in a container.
_KERNEL_ARGUMENTS = ("root=/dev/vda", "rw", "console=ttyS0", "quiet", "net.ifnames=0")

# What mmdebstrap says when it begins a phase, and how much of the whole is done then, in percent (measured).
_PHASES = (
    ("running apt-get update", "fetching package lists", 2),
    ("downloading packages", "fetching packages", 8),
    ("extracting archives", "unpacking", 14),
    ("installing essential packages", "installing the base", 18),
    ("installing remaining packages", "installing packages", 25),
    ("running --customize-hook", "finishing the tree", 74),
)


@dataclass(frozen=True, kw_only=True)
class _Build:
    """A build under way: where it works and whom it tells."""

    host: Host
    request: BuildRequest
    directory: Path
    events: Sink

    @property
    def image(self) -> Path:
        """Becomes the image's directory."""
        return self.directory / "image"

    @property
    def rootfs(self) -> Path:
        return self.image / "tree" / "rootfs"

    def tell(self, task: str, percent: float) -> None:
        self.host.pause(0)
        self.events(Progress(self.request.name, task, percent, 100))


def build(host: Host, request: BuildRequest, events: Sink) -> Image:
    """Build an image, publish it and give it its name.

    Takes about a minute, and 3 GiB of the store meanwhile. Raises HostError when there is less, CommandFailed with the
    reason when a program fails; nothing of it stays then, and the name means what it did.
    """
    available_bytes = host.shell.call(files.available_bytes, host.store.building)
    if available_bytes < _NEEDED_BYTES:
        raise HostError(
            f"building {request.name!r} takes {format_size(_NEEDED_BYTES)} in {str(host.store.root)!r}, "
            f"and only {format_size(available_bytes)} are free",
            hint="free some space: hvctl image list; hvctl gc",
        )
    with _building_directory(host) as directory:
        work = _Build(host=host, request=request, directory=directory, events=events)
        _make_tree(work)
        disk = _make_disk(work)
        image = _seal(work, disk)
        work.tell("publishing", 98)
        host.shell.call(files.set_mode, work.image, 0o711)
        published.publish(host, work.image, image)
        work.tell("done", 100)
    return image


@contextlib.contextmanager
def _building_directory(host: Host) -> Iterator[Path]:
    """A private directory for the block; its lock tells `gc` that somebody is working there."""
    name = secrets.token_hex(8)
    directory = host.store.building / name
    with host.lock(f"building-{name}"):
        try:
            host.shell.call(files.make_directory, directory, 0o700)
            yield directory
        finally:
            host.shell.call(files.remove, directory)


def _make_tree(work: _Build) -> None:
    call = work.host.shell.call
    for path, mode in ((work.image, 0o700), (work.rootfs.parent, 0o700)):
        call(files.make_directory, path, mode)
    call(files.write_file, work.directory / "guest.tar", guestfiles.pack(), 0o600)
    call(files.write_file, work.directory / "customize.sh", guestfiles.read_customize_script(), 0o600)
    sources = aptconfig.format_sources(aptconfig.find_sources(work.host), work.request.suite)
    call(files.write_file, work.directory / "sources.list", sources.encode(), 0o600)
    # The user that apt downloads as cannot enter our private directory.
    options = aptconfig.format_options(work.host) + 'APT::Sandbox::User "root";\n'
    call(files.write_file, work.directory / "apt.conf", options.encode(), 0o600)

    def on_line(line: str) -> None:
        for words, task, percent in _PHASES:
            if line.startswith("I: ") and words in line:
                work.tell(task, percent)

    work.tell("starting", 0)
    done = work.host.shell.run(_bootstrap_command(work), timeout_s=_BOOTSTRAP_TIMEOUT_S, check=False, on_line=on_line)
    if done.status != 0:
        raise _bootstrap_failure(work.request, done)


def _bootstrap_failure(request: BuildRequest, done: Completed) -> CommandFailed:
    """Of hundreds of lines, those in which apt and mmdebstrap name the error."""
    errors = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith("E: ")]
    hint = "check the mirrors: apt-get update"
    if "Unable to locate package" in done.stderr or "has no installation candidate" in done.stderr:
        hint = f"look for its name in {request.suite}: https://packages.debian.org"
    elif "No space left" in done.stderr:
        hint = "free some space: see `hvctl host doctor`"
    return CommandFailed(
        f"building {request.name!r} failed: {'; '.join(errors[:3]) or f'mmdebstrap ended with {done.status}'}",
        hint=hint,
        status=done.status,
        stderr=done.stderr,
    )


def _bootstrap_command(work: _Build) -> list[str]:
    quoted = {name: shlex.quote(str(work.directory / name)) for name in ("guest.tar", "customize.sh")}
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join((*_PACKAGES, *work.request.packages))}",
        f"--aptopt={work.directory / 'apt.conf'}",
        "--dpkgopt=force-unsafe-io",  # the tree is synced as a whole when it is published
        "--skip=output/dev",  # no device nodes in the store; every guest has a devtmpfs
        f"--setup-hook=tar-in {quoted['guest.tar']} /",
        f'--customize-hook=sh {quoted["customize.sh"]} "$1" {work.request.suite}',
        work.request.suite,
        str(work.rootfs),
        str(work.directory / "sources.list"),
    ]


def _make_disk(work: _Build) -> Disk:
    """The whole-disk ext4 file system of the tree, as qcow2."""
    raw, disk = work.directory / "disk.raw", work.image / "disk.qcow2"
    work.tell("making the file system", 80)
    make_file_system = [
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-L",
        "root",
        "-m",
        "1",
        "-e",
        "remount-ro",
        # The file is sparse, so zeroing all inode tables now costs nothing; a guest would write them in the background
        # of its first boot, into its own layer.
        "-E",
        "lazy_itable_init=0,lazy_journal_init=1,nodiscard",
        "-d",
        str(work.rootfs),
        "--",
        str(raw),
        f"{work.request.disk_bytes // 1024}k",
    ]
    work.host.shell.run(make_file_system, timeout_s=_DISK_TIMEOUT_S)
    work.tell("making the disk", 87)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "--", str(raw), str(disk)]
    work.host.shell.run(convert, timeout_s=_DISK_TIMEOUT_S)
    work.host.shell.call(files.remove, raw)
    work.tell("computing digests", 94)
    return Disk(artefact=_artefact(work, disk), format="qcow2", virtual_bytes=work.request.disk_bytes)


def _seal(work: _Build, disk: Disk) -> Image:
    """Kernel and initrd beside the disk, and the manifest over everything."""
    call, boot = work.host.shell.call, work.rootfs / "boot"
    releases = [name.removeprefix("vmlinuz-") for name in call(files.list_names, boot) if name.startswith("vmlinuz-")]
    if len(releases) != 1:
        raise HostError(
            f"the tree of {work.request.name!r} has {len(releases)} kernels instead of one",
            hint="leave kernel packages away from --package",
        )
    for source, target in ((f"vmlinuz-{releases[0]}", "vmlinuz"), (f"initrd.img-{releases[0]}", "initrd")):
        call(files.clone_file, boot / source, work.image / target, 0o444)
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    image = manifest.seal(
        Image(
            id="",
            name=work.request.name,
            os="debian",
            version=work.request.version,
            architecture="x86_64",
            created_at=now.isoformat().replace("+00:00", "Z"),
            login_user="root",
            provision=Provision.CREDENTIALS,
            disk=disk,
            kernel=_artefact(work, work.image / "vmlinuz"),
            initrd=_artefact(work, work.image / "initrd"),
            kernel_arguments=_KERNEL_ARGUMENTS,
            kernel_release=releases[0],
            has_tree=True,
            packages=work.request.packages,
        )
    )
    call(files.write_file, work.image / "manifest.json", manifest.format_manifest(image), 0o444)
    return image


def _artefact(work: _Build, path: Path) -> Artefact:
    call = work.host.shell.call
    call(files.set_mode, path, 0o444)
    return Artefact(file=path.name, size_bytes=call(files.size, path), sha256=call(files.hash_file, path))
