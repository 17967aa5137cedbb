"""Which accelerator a guest gets, and why: 64-bit code is run and timed before anybody is promised KVM.

`/dev/kvm` may open, create virtual machines and still be an emulation that no 64-bit kernel boots on; libvirt and
QEMU then offer it all the same. The verdict is kept in `RUN/accel.json` for as long as the host stays booted with the
same QEMU binary and the same `/dev/kvm`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING

from hvctl.accel import probe
from hvctl.errors import HostError, HvctlError, UsageError
from hvctl.hostside import files, machine
from hvctl.model import AccelChoice, Accelerator, AccelVerdict

if TYPE_CHECKING:
    from hvctl.host import Host

# Debian, Ubuntu, Arch and openSUSE have the first in the PATH; Fedora's family the second, outside it.
QEMU_PROGRAMS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")

log = logging.getLogger(__name__)


def verdict(host: Host, *, refresh: bool = False) -> AccelVerdict:
    """What runs guests best on this host: from the cache, or tried now (2 s at most, 30 s on an emulated host).

    `refresh` tries again in any case. Writes the cache where this user may. Raises HostError when there is no QEMU.
    """
    qemu = get_qemu(host)
    key = host.shell.call(machine.acceleration_key, qemu)
    found = None if refresh else _read_cache(host, key)
    if found is None:
        found = probe.try_kvm(host.shell, qemu)
        if found.is_lasting:
            _write_cache(host, key, found)
    return found


def choose(host: Host, choice: AccelChoice, *, require_kvm: bool) -> tuple[Accelerator, str]:
    """The accelerator for a guest and the line that says why, which begins with its name.

    Raises HostError when KVM is wanted and not healthy, UsageError when it is required and refused at once.
    """
    if choice is AccelChoice.TCG:
        if require_kvm:
            raise UsageError("--require-kvm and --accel tcg exclude each other", hint="leave one of them away")
        return Accelerator.TCG, "tcg (software emulation): asked for"
    found = verdict(host)
    if found.accelerator is not Accelerator.KVM and (require_kvm or choice is AccelChoice.KVM):
        raise HostError(
            f"no guest can run with kvm on this host: {found.finding}",
            hint="leave --accel and --require-kvm away to run it in software, or see: hvctl host doctor",
        )
    return found.accelerator, found.line


def get_qemu(host: Host) -> str:
    """The path of the QEMU program. Raises HostError when it is not installed."""
    path = host.shell.call(machine.find_program, QEMU_PROGRAMS)
    if not path:
        raise HostError(
            f"no guest can run: {QEMU_PROGRAMS[0]!r} is not installed on this host",
            hint="apt-get install qemu-system-x86 (or what your distribution calls it)",
        )
    return path


def _read_cache(host: Host, key: str) -> AccelVerdict | None:
    """The verdict that was kept under this key, or None; a broken file is the same as none."""
    try:
        kept = json.loads(host.shell.call(files.read_file, host.store.accelerator))
        if kept["key"] != key:
            return None
        values = kept["verdict"]
        return AccelVerdict(**{**values, "accelerator": Accelerator(values["accelerator"])})
    except (HvctlError, ValueError, TypeError, KeyError) as error:
        log.debug("no kept verdict on the accelerator: %s", error)
        return None


def _write_cache(host: Host, key: str, found: AccelVerdict) -> None:
    content = json.dumps({"key": key, "verdict": dataclasses.asdict(found)}, indent=2) + "\n"
    try:
        host.shell.call(files.write_file, host.store.accelerator, content.encode(), 0o644)
    except HvctlError as error:  # not root, or not set up yet: tried again next time
        log.debug("the verdict on the accelerator is not kept: %s", error)
