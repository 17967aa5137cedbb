"""QEMU, and what runs a guest's instructions."""

from __future__ import annotations

import re

from hvctl import accel
from hvctl.doctor import guestuser
from hvctl.doctor.finding import Outcome, check, failed, not_applicable, ok, warning
from hvctl.host import Host
from hvctl.hostside import machine
from hvctl.model import Accelerator

_INSTALL = "apt-get install qemu-system-x86 qemu-utils"


@check("qemu", is_vital=True)
def qemu(host: Host) -> Outcome:
    """QEMU and qemu-img are installed and start."""
    path = accel.get_qemu(host)
    if not host.shell.call(machine.find_program, ("qemu-img",)):
        return failed("'qemu-img' is not installed on this host", fix=_INSTALL)
    version = host.shell.run([path, "--version"], timeout_s=10).text
    return ok(f"{path}: {version.splitlines()[0] if version else 'says no version'}")


@check("accelerator")
def accelerator(host: Host) -> Outcome:
    """64-bit guest code runs at the hardware's speed; tried anew each time."""
    verdict = accel.verdict(host, refresh=True)
    if verdict.accelerator is not Accelerator.KVM:
        return warning(f"{verdict.line}; guests run, some ten times slower", fix=_loading(verdict.finding))
    return ok(verdict.line)


@check("kvm for guests", needs_libvirt=True)
def kvm_for_guests(host: Host) -> Outcome:
    """The user that libvirt runs QEMU as may open the device, too."""
    if accel.verdict(host).accelerator is not Accelerator.KVM:
        return not_applicable("guests run without it")
    user = guestuser.find(host)
    if user is None or guestuser.may(host, user, "-w", machine.KVM):
        return ok(f"whoever runs guests may open {machine.KVM}")
    return failed(
        f"{user.label}, as whom libvirt runs guests, may not open {machine.KVM}",
        fix=f"usermod -aG kvm {user.name} && chgrp kvm {machine.KVM} && chmod 0660 {machine.KVM}",
    )


def _loading(finding: str) -> str:
    """The command that may bring KVM, where the processor has what it takes."""
    found = re.search(r"module (kvm_\w+) is not loaded", finding)
    return f"modprobe {found.group(1)}" if found else ""
