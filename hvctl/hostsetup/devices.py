"""/dev/kvm for the user that QEMU runs as, where no udev gives it to the group `kvm`.

While libvirt may open the device and QEMU's user may not, libvirt throws away what it learnt of QEMU at every call and
starts two QEMUs to learn it again: 4 to 30 s for each `define` (libvirt 9.0, "KVM was enabled when probing, but it is
not available now").
"""

from __future__ import annotations

import functools
import grp
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hvctl.host import Host
from hvctl.hostsetup.change import Change

_DEVICE = Path("/dev/kvm")
_MODE = 0o660  # what udev's rule for it says (50-udev-default.rules)


def missing(_host: Host) -> Iterator[Change]:
    if Path("/run/udev/control").exists() or not _DEVICE.exists():
        return
    try:
        group_id = grp.getgrnam("kvm").gr_gid
    except KeyError:
        return
    facts = _DEVICE.stat()
    if not stat.S_ISCHR(facts.st_mode) or facts.st_mode & 0o006 == 0o006:
        return
    if facts.st_gid != group_id or facts.st_mode & 0o060 != 0o060:
        text = f"give {_DEVICE} to the group kvm ({_MODE:04o}), as udev would"
        yield Change(text=text, apply=functools.partial(_give, group_id))


def present(_host: Host) -> Iterator[Change]:
    """Nothing: other programs of the group may have come to need it, and a boot takes it back."""
    return iter(())


def _give(group_id: int) -> None:
    os.chown(_DEVICE, -1, group_id)
    _DEVICE.chmod(_MODE)
