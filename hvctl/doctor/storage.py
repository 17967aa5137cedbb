"""The store: is it there, can the user that runs guests reach it, is there room?"""

from __future__ import annotations

import shlex
from pathlib import Path

from hvctl.doctor import guestuser
from hvctl.doctor.finding import Outcome, check, failed, not_applicable, ok, warning
from hvctl.host import Host
from hvctl.hostside import files, machine
from hvctl.units import GIB, MIB, format_size

LEAST_BYTES = 512 * MIB
COMFORTABLE_BYTES = 5 * GIB
_LEAST_INODES = 1000


@check("store", is_vital=True)
def store(host: Host) -> Outcome:
    """The directories that `host setup` makes are there, and nobody but root can write to them."""
    names = (host.store.root, host.store.images, host.store.layers, host.store.instances, host.store.building)
    for path in (*names, host.store.locks):
        facts = host.shell.call(machine.describe_access, path)
        if facts is None:
            return failed(f"{str(path)!r} does not exist", fix="hvctl host setup")
        mode, owner, group = facts
        if path != host.store.locks and (owner != "root" or mode & 0o022):
            return failed(
                f"{str(path)!r} belongs to {owner}:{group} with mode {mode:04o}: others than root may change guests",
                fix=f"chown root:root {shlex.quote(str(path))} && chmod go-w {shlex.quote(str(path))}",
            )
    return ok(f"{str(host.store.root)!r} is set up")


@check("way to the disks", is_vital=True, needs_libvirt=True)
def reach(host: Host) -> Outcome:
    """The user that libvirt runs QEMU as may pass through every directory on the way to a disk."""
    user = guestuser.find(host)
    if user is None:
        return ok("libvirt does not change the user that guests run as")
    if not guestuser.can_ask():
        return not_applicable(f"only root can try it as {user.label}")
    if not host.shell.call(files.exists, host.store.root):
        return not_applicable(f"{str(host.store.root)!r} does not exist yet")
    closed = find_closed(
        host, user, host.store.layers if host.shell.call(files.exists, host.store.layers) else host.store.root
    )
    if closed is not None:
        return failed(
            f"{user.label}, as whom libvirt runs guests, may not pass through {str(closed)!r}",
            fix=f"chmod o+x {shlex.quote(str(closed))}",
        )
    return ok(f"{user.label} can pass to {str(host.store.layers)!r}")


def find_closed(host: Host, user: guestuser.GuestUser, path: Path) -> Path | None:
    """The first directory from the root down to this path that the user may not pass through."""
    ways = (*reversed(path.parents), path)
    return next((way for way in ways if not guestuser.may(host, user, "-x", way)), None)


@check("disk space", is_vital=True)
def disk_space(host: Host) -> Outcome:
    """The store's file system has room for a guest."""
    place = host.shell.call(machine.find_nearest, host.store.root)
    free_bytes, all_bytes, inodes = host.shell.call(machine.measure_space, place)
    known = f"{format_size(free_bytes)} of {format_size(all_bytes)} are free for {str(host.store.root)!r}"
    if free_bytes < LEAST_BYTES:
        return failed(
            f"{known}: too little for a guest", fix="hvctl gc, or delete what is not needed: hvctl image list"
        )
    if 0 <= inodes < _LEAST_INODES:
        return failed(f"{known}, but only {inodes} inodes", fix="hvctl gc, or delete what is not needed")
    if free_bytes < COMFORTABLE_BYTES:
        return warning(f"{known}: enough for one or two guests", fix="hvctl gc")
    return ok(known)
