"""What confines a guest's process beyond its user, AppArmor; and what reads images from elsewhere, the sandbox."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hvctl.doctor.finding import Outcome, check, failed, not_applicable, ok, warning
from hvctl.host import Host
from hvctl.hostside import machine, sandbox

ENABLED = Path("/sys/module/apparmor/parameters/enabled")
PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_NEEDED = {"libvirtd": "usr.sbin.libvirtd", "virt-aa-helper": "usr.lib.libvirt.virt-aa-helper"}
_PACKAGES = {"prlimit": "util-linux", "bwrap": "bubblewrap", "zstd": "zstd", "sqfs2tar": "squashfs-tools-ng"}


@check("sandbox")
def confined_programs(host: Host) -> Outcome:
    """Images from elsewhere are read by confined programs: what those take is installed, and bubblewrap works here."""
    if os.geteuid() != 0:
        return not_applicable("only root takes images in")
    missing = [name for name in _PACKAGES if not host.shell.call(machine.find_program, (name,))]
    if missing:
        packages = " ".join(_PACKAGES[name] for name in missing)
        return failed(f"{', '.join(map(repr, missing))} not installed on this host", fix=f"apt-get install {packages}")
    for capabilities in ((), sandbox.WRITE_ANY_OWNER):
        confinement = sandbox.Confinement(directory=Path("/usr"), is_read_only=True, capabilities=capabilities)
        done = host.shell.run(sandbox.command(confinement, ["true"]), timeout_s=30, check=False)
        if done.status != 0:
            return failed(
                f"programs cannot be confined: {done.stderr.strip()[:200]}", fix="allow root to make namespaces"
            )
    return ok("programs that read images from elsewhere are confined by bubblewrap")


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
