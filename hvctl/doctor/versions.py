"""Versions of what hvctl stands on."""

from __future__ import annotations

import os
import platform

from hvctl import accel
from hvctl.doctor import daemons
from hvctl.doctor.finding import Outcome, check, ok, warning
from hvctl.errors import HvctlError
from hvctl.host import Host
from hvctl.hostside import machine

# The oldest that hvctl is tested with (Debian 12), and for the kernel the first with overlays on idmapped mounts.
OLDEST = {"libvirt": (9, 0), "QEMU": (7, 2), "kernel": (5, 19), "python": (3, 11)}


@check("versions")
def versions(host: Host) -> Outcome:
    """libvirt, QEMU, kernel and Python are no older than what hvctl is tested with."""
    found = {
        "libvirt": _libvirt(host),
        "QEMU": _qemu(host),
        "kernel": os.uname().release,
        "python": platform.python_version(),
    }
    known = ", ".join(f"{name} {version or 'unknown'}" for name, version in found.items())
    old = [name for name, version in found.items() if version and parse(version) < OLDEST[name]]
    if old:
        wanted = ", ".join(f"{name} {'.'.join(map(str, OLDEST[name]))}" for name in old)
        return warning(f"{known}; hvctl is tested with no older than {wanted}")
    return ok(known)


def parse(version: str) -> tuple[int, int]:
    """The first two numbers of a version: `6.1.0-13-cloud` is (6, 1)."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    return int(major) if major.isdigit() else 0, int(minor) if minor.isdigit() else 0


def _libvirt(host: Host) -> str:
    """The installed one: the daemon that runs may hang."""
    program = host.shell.call(machine.find_program, daemons.PROGRAMS)
    return daemons.find_installed(host, program) if program else ""


def _qemu(host: Host) -> str:
    try:
        words = host.shell.run([accel.get_qemu(host), "--version"], timeout_s=10).text.split()
    except HvctlError:
        return ""
    return next((word for word in words if word[0].isdigit()), "")
