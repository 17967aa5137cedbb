"""What holds a container that libvirt does not do: limits where the container's root cannot lift them.

Two kinds of host (cgroups(7)):

- **version 1, nobody managing it** (a CI runner): the files of a group are root's, so libvirt's own limits hold. There
  is no number of processes in libvirt-LXC, and no group of the hierarchy `name=systemd` for the systemd inside: we make
  both, and the emulator wrapper (`emulator.py`) is in them before the container begins.
- **version 2 under systemd**: libvirt gives the container's root the files of its own group, `memory.max` among them.
  So the same limits stand on the scope around it, whose files stay root's; systemd sets them.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from hvctl.hostside import daemons, files, groups

_GROUPS = {"cgroup.max.depth": "64", "cgroup.max.descendants": "10000"}
"""What a container's root may make of groups of its own: libvirt walks them all when it ends one (2,500 deep: never)."""
DEFAULT_PROCESSES = 4096
"""Processes and threads of a container for which nothing else was asked."""
_TIMEOUT_S = 20


class Limits:
    """What one container may use. first_id: its first uid outside; 0 for a privileged one."""

    def __init__(self, first_id: int, memory_bytes: int, cpus: int, processes: int) -> None:
        self.first_id = first_id
        self.memory_bytes = memory_bytes
        self.cpus = cpus
        self.processes = processes


def make_groups(name: str, uuid: str, limits: Limits) -> None:
    """The groups that nobody else makes, for a container about to start; the emulator wrapper is told of them."""
    trees = {} if daemons.has_systemd() else groups.find_hierarchies()
    joined = []
    for controller in sorted(trees.keys() & {"pids", "name=systemd"}):
        group = groups.find_own(trees[controller], uuid)
        os.makedirs(group, exist_ok=True)
        if controller == "pids":
            groups.write(f"{group}/pids.max", str(limits.processes))
        else:  # the systemd inside makes its groups here
            for path in (group, f"{group}/cgroup.procs", f"{group}/{groups.TASKS}"):
                os.chown(path, limits.first_id, limits.first_id)
        joined.append(f"{group}/{groups.TASKS}\n")
    folder = Path(groups.NOTES)
    files.make_directory(folder, 0o700)
    files.write_file(folder / name, "".join(joined).encode(), 0o600)


def hold(controller: int, limits: Limits) -> None:
    """Put these limits around a container that runs, given the process of its controller; fine when they are there."""
    groups.spare(controller)  # without it the container is gone; it has started all that it ever starts
    scope = find_scope(controller)
    if scope:
        import subprocess  # here: a start that needs none is 5 ms quicker

        words = [
            *("systemctl", "set-property", "--runtime", "--", os.path.basename(scope)),
            f"MemoryMax={limits.memory_bytes}",
            f"TasksMax={limits.processes}",
            f"CPUQuota={limits.cpus * 100}%",
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise OSError(f"systemd refused the limits: {done.stderr.strip()[:300]}")
        for name, value in _GROUPS.items():
            groups.write(f"{groups.find_unified()}{scope}/{name}", value)
        return
    group = _group_of(controller, "pids")
    if group:
        groups.write(f"{group}/pids.max", str(limits.processes))


def release(name: str, uuid: str) -> None:
    """Remove what a container that has ended left: our groups, and libvirt's where it died with the container."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{groups.NOTES}/{name}")
    for tree in set(groups.find_hierarchies().values()):
        groups.remove(groups.find_own(tree, uuid))
        for group in files.list_names(Path(tree, "machine")):
            if groups.is_libvirts(group, name):
                groups.remove(f"{tree}/machine/{group}")


def find_scope(controller: int) -> str:
    """The group of the systemd scope that a container's controller is in; an empty string: another kind of host."""
    for names, path in groups.find_memberships(controller):
        scope = re.match(r"(.*/machine-[^/]+\.scope)(?:/|$)", path)
        if names in ("", "name=systemd") and scope:
            return scope.group(1)
    return ""


def _group_of(process: int, controller: str) -> str:
    tree = groups.find_hierarchies().get(controller)
    for names, path in groups.find_memberships(process):
        if tree and controller in names.split(","):
            return f"{tree}{path}"
    return ""
