"""Debian images: one mmdebstrap run gives the root tree, the root disk, kernel and initrd."""

from __future__ import annotations

import shlex
from pathlib import Path

from hvctl.errors import CommandFailed, HostError
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Disk, Image, Provision
from hvctl.rootfs import aptconfig, filesystem, guestfiles
from hvctl.rootfs.building import Building, begin
from hvctl.rootfs.request import BuildRequest
from hvctl.shell import Completed
from hvctl.units import GIB, now
from hvctl.values import dataclass

_BOOTSTRAP_TIMEOUT_S = 3600
_NEEDED_BYTES = 3 * GIB

# On top of mmdebstrap's "minbase" (Essential and apt). busybox-static and xz-utils are for the initrd.
_PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "e2fsprogs", "iproute2", "netbase", "openssh-server"),
    *("linux-image-cloud-amd64", "initramfs-tools", "busybox-static", "xz-utils", "cloud-init", "qemu-guest-agent"),
    *("ca-certificates", "iputils-ping", "less", "procps", "vim-tiny"),
)

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
    """A build under way, and what is to be built."""

    building: Building
    request: BuildRequest

    @property
    def host(self) -> Host:
        return self.building.host

    @property
    def directory(self) -> Path:
        return self.building.directory

    @property
    def image(self) -> Path:
        return self.building.image

    @property
    def rootfs(self) -> Path:
        return self.building.rootfs

    def tell(self, task: str, percent: float) -> None:
        self.building.tell(task, percent)


def build(host: Host, request: BuildRequest, events: Sink) -> Image:
    """Build an image, publish it and give it its name.

    Takes about a minute, and 3 GiB of the store meanwhile. Raises HostError when there is less, CommandFailed with the
    reason when a program fails; nothing of it stays then, and the name means what it did.
    """
    with begin(host, request.name, events, needed_bytes=_NEEDED_BYTES) as building:
        work = _Build(building=building, request=request)
        _make_tree(work)
        percent = filesystem.Percent(file_system=80, disk=87, digests=94)
        target, size_bytes = work.image / "disk.qcow2", request.disk_bytes
        disk = filesystem.make_disk(building, work.rootfs, target, virtual_bytes=size_bytes, percent=percent)
        return building.publish(_describe(work, disk))


def _make_tree(work: _Build) -> None:
    call = work.host.shell.call
    call(files.make_directory, work.rootfs.parent, 0o700)
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
    # No device nodes in the store; every guest mounts a /dev of its own.
    call(files.remove, work.rootfs / "dev")
    call(files.make_directory, work.rootfs / "dev", 0o755)


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
        f"--setup-hook=tar-in {quoted['guest.tar']} /",
        f'--customize-hook=sh {quoted["customize.sh"]} "$1" {work.request.suite}',
        work.request.suite,
        str(work.rootfs),
        str(work.directory / "sources.list"),
    ]


def _describe(work: _Build, disk: Disk) -> Image:
    """Kernel and initrd beside the disk, and everything as a value."""
    call, boot = work.host.shell.call, work.rootfs / "boot"
    releases = [name.removeprefix("vmlinuz-") for name in call(files.list_names, boot) if name.startswith("vmlinuz-")]
    if len(releases) != 1:
        raise HostError(
            f"the tree of {work.request.name!r} has {len(releases)} kernels instead of one",
            hint="leave kernel packages away from --package",
        )
    for source, target in ((f"vmlinuz-{releases[0]}", "vmlinuz"), (f"initrd.img-{releases[0]}", "initrd")):
        call(files.clone_file, boot / source, work.image / target, 0o444)
    return Image(
        id="",
        name=work.request.name,
        os="debian",
        version=work.request.version,
        architecture="x86_64",
        created_at=now(),
        login_user="root",
        provision=Provision.CREDENTIALS,
        disk=disk,
        kernel=work.building.artefact(work.image / "vmlinuz"),
        initrd=work.building.artefact(work.image / "initrd"),
        kernel_arguments=filesystem.KERNEL_ARGUMENTS,
        kernel_release=releases[0],
        has_tree=True,
        packages=work.request.packages,
    )
