"""What confines a guest's process beyond its user: AppArmor."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hvctl.doctor.finding import Outcome, check, not_applicable, ok, warning
from hvctl.host import Host
from hvctl.hostside import machine

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_NEEDED = {"libvirtd": "usr.sbin.libvirtd", "virt-aa-helper": "usr.lib.libvirt.virt-aa-helper"}


@check("apparmor")
def apparmor(host: Host) -> Outcome:
    """Where the kernel has it, libvirt's two profiles are loaded and enforced, so that each guest gets its own."""
    if (host.shell.call(machine.find_text, ENABLED) or "").strip() != "Y":
        return not_applicable("the kernel runs without AppArmor: guests are confined by their user alone")
    if os.geteuid() != 0:
        return not_applicable("only root may read which profiles are loaded")
    return judge_profiles(host.shell.call(machine.find_text, PROFILES) or "")


def judge_profiles(listing: str) -> Outcome:
    """What a listing of loaded profiles comes to: lines of `NAME (MODE)`."""
    modes = dict(re.findall(r"^(?:/usr/(?:s?bin|lib/libvirt)/)?(\S+) \((\w+)\)$", listing, re.MULTILINE))
    for name, file in _NEEDED.items():
        if name not in modes:
            return warning(f"the profile {name!r} is not loaded", fix=f"apparmor_parser -r /etc/apparmor.d/{file}")
        if modes[name] != "enforce":
            return warning(f"the profile {name!r} is in mode {modes[name]!r}", fix=f"aa-enforce /etc/apparmor.d/{file}")
    return ok(f"profiles of {' and '.join(_NEEDED)} are enforced")
