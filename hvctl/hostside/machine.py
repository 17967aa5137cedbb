"""Facts about a machine that decide how guests run on it, each read in microseconds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

KVM = Path("/dev/kvm")
_EMULATED_CPUS = ("QEMU TCG CPU", "QEMU Virtual CPU")


def find_program(names: Sequence[str]) -> str:
    """The path of the first of these programs that is installed, or an empty string."""
    return next((path for name in names if (path := shutil.which(name))), "")


def acceleration_key(qemu: str) -> str:
    """A line that changes when a verdict on the accelerator may change: another boot, QEMU binary or `/dev/kvm`.

    Size and mtime stand for QEMU's version, which only QEMU itself could tell. Raises OSError without the binary.
    """
    facts = os.stat(qemu)
    parts = [read_boot_id(), qemu, str(facts.st_size), str(facts.st_mtime_ns)]
    try:
        device = KVM.stat()
        parts.append(f"{device.st_ino}:{device.st_rdev}:{device.st_mode:o}:{device.st_uid}:{device.st_gid}")
    except OSError:
        parts.append("no kvm")
    return " ".join(parts)


def read_boot_id() -> str:
    """The kernel's identifier of this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find_kvm_problem() -> tuple[str, bool]:
    """Why KVM cannot even be tried, or an empty string; and whether that is so for every user of the host."""
    architecture = os.uname().machine
    if architecture != "x86_64":
        return f"guests are x86_64, this host is {architecture}", True
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"{KVM} does not exist ({_read_virtualisation()})", True
    except PermissionError:
        return f"this user (uid {os.geteuid()}) has no permission to open {KVM}", False
    except OSError as error:
        return f"{KVM} does not open: {error.strerror}", True
    return "", True


def is_emulated() -> bool:
    """Whether this machine's own processor is emulated in software."""
    return any(name in _read_cpuinfo() for name in _EMULATED_CPUS)


def _read_virtualisation() -> str:
    flags = _read_cpuinfo().partition("\nflags")[2].partition("\n")[0].split()
    if "svm" in flags or "vmx" in flags:
        return "the processor has virtualisation, its kernel module is not loaded"
    return "the processor offers no virtualisation"


def _read_cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text(errors="replace")
