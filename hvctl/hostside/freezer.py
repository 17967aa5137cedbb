"""Freezing a container where libvirt cannot: its LXC driver knows the freezer of control groups version 1 only, and forgets
whom it has frozen there when it is restarted.

(Seen with libvirt 9.0; on a host with version 2: "Suspend operation failed".) In version 2 every group has a freezer
(cgroups(7), `cgroup.freeze`). The groups that the container's init made for itself are frozen; its controller, which
libvirt talks to, is in the group above them and goes on. Nobody inside can thaw them: nobody inside runs.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from hvctl.hostside import groups

_TIMEOUT_S = 10.0


def has_own(controller: int) -> bool:
    """Whether this container is to be frozen here, and not by libvirt. Raises OSError when it has ended."""
    return not _find_libvirts(controller)


def freeze(controller: int) -> None:
    """Stop all that runs in a container; returns when it has stopped. Raises OSError, all thawed, when it does not."""
    found = _find_groups(controller)
    try:
        for group in found:
            groups.write(f"{group}/cgroup.freeze", "1")
        deadline_s = time.monotonic() + _TIMEOUT_S
        for group in found:
            _wait_until_frozen(group, deadline_s)
    except OSError:
        thaw(controller)
        raise


def thaw(controller: int) -> None:
    """Let a container go on; fine when it does."""
    state = _find_libvirts(controller)
    if state:
        groups.write(state, "THAWED")
        return
    for group in _find_groups(controller):
        groups.write(f"{group}/cgroup.freeze", "0")


def is_frozen(controller: int) -> bool:
    """Whether a container is frozen, by `freeze` or by libvirt; False for one that has ended."""
    try:
        state = _find_libvirts(controller)
        if state:
            return Path(state).read_text().strip() == "FROZEN"
        return _is_frozen(f"{groups.find_unified()}{_group_of(groups.find_init(controller))}")
    except OSError:
        return False


def _find_libvirts(controller: int) -> str:
    """The file of version 1 by which libvirt freezes a container; empty where there is none."""
    for names, path in groups.find_memberships(controller):
        if "freezer" in names.split(","):
            return f"{groups.find_hierarchies()['freezer']}{path}/freezer.state"
    return ""


def _find_groups(controller: int) -> list[str]:
    """Those below the controller's group; its own where a container's init has made none and stayed in it."""
    top = f"{groups.find_unified()}{_group_of(controller)}"
    if _group_of(groups.find_init(controller)) == _group_of(controller):
        return [top]
    return [entry.path for entry in os.scandir(top) if entry.is_dir(follow_symlinks=False)]


def _wait_until_frozen(group: str, deadline_s: float) -> None:
    """The kernel tells by POLLPRI on cgroup.events when that changes."""
    with open(f"{group}/cgroup.events") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while not _is_frozen(group):
            if time.monotonic() > deadline_s:
                raise OSError("its processes do not stop")
            poll.poll(200)
            events.seek(0)
            events.read()


def _is_frozen(group: str) -> bool:
    return "frozen 1" in Path(group, "cgroup.events").read_text()


def _group_of(process: int) -> str:
    """Its group in the tree of version 2."""
    return next(path for names, path in groups.find_memberships(process) if not names)
