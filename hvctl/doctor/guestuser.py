"""The user that libvirt runs QEMU as, and what that user may do with a path."""

from __future__ import annotations

import os
from pathlib import Path

from hvctl.host import Host
from hvctl.hostside import machine
from hvctl.libvirtapi import survey
from hvctl.model import Mode
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class GuestUser:
    """A user by number; the name is empty where the number has none."""

    uid: int
    gid: int
    name: str

    @property
    def label(self) -> str:
        return f"user {self.name!r} (uid {self.uid})" if self.name else f"uid {self.uid}"


def find(host: Host) -> GuestUser | None:
    """The user, or None where guests run as libvirtd itself does. Raises HostError when libvirt does not answer."""
    owner = survey.find_guest_owner(host.connection(Mode.VM))
    if owner is None or owner[0] == 0:
        return None
    return GuestUser(uid=owner[0], gid=owner[1], name=host.shell.call(machine.find_user_name, owner[0]))


def can_ask() -> bool:
    """Whether we may act as another user."""
    return os.geteuid() == 0


def may(host: Host, user: GuestUser, permission: str, path: Path) -> bool:
    """Whether the user has this permission (`-x`, `-r`, `-w` of test(1)), by asking the kernel as that user.

    So that access control lists, groups and security modules count too. Needs root; says yes without.
    """
    if not can_ask():
        return True
    groups = ["--init-groups"] if user.name else ["--clear-groups"]
    become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", *groups]
    return host.shell.run([*become, "test", permission, path], timeout_s=10, check=False).status == 0
