"""Control groups: which tree the host has, and the trap of the hybrid one."""

from __future__ import annotations

import re
from pathlib import Path

from hvctl.doctor.finding import Outcome, check, failed, ok, warning
from hvctl.host import Host
from hvctl.hostside import files, machine
from hvctl.values import dataclass

NEEDED = ("cpu", "cpuset", "devices", "memory", "pids")
SYSTEMD = Path("/run/systemd/system")
PID_FILES = tuple(Path(f"/run/{name}.pid") for name in ("libvirtd", "libvirt/libvirtd", "virtlxcd", "libvirt/virtlxcd"))


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The control groups in one list of mounts."""

    v1: tuple[str, ...]
    """Controllers that have a version 1 hierarchy."""
    v2: str
    """Where the version 2 tree is mounted, or empty."""

    @property
    def kind(self) -> str:
        return "hybrid" if self.v1 and self.v2 else "version 1" if self.v1 else "version 2" if self.v2 else "none"


def parse_mounts(text: str) -> Tree:
    """The tree in the text of /proc/PID/mounts (proc_pid_mounts(5))."""
    words = [line.split() for line in text.splitlines()]
    mounts = [(line[1], line[2], line[3].split(",")) for line in words if len(line) > 3]
    controllers = {name for _path, kind, options in mounts if kind == "cgroup" for name in options}
    return Tree(
        v1=tuple(sorted(controllers & {*NEEDED, "blkio", "cpuacct", "freezer", "name=systemd"})),
        v2=next((path for path, kind, _options in mounts if kind == "cgroup2"), ""),
    )


@check("cgroups")
def cgroups(host: Host) -> Outcome:
    """The controllers that limit guests are there."""
    tree = parse_mounts(host.shell.call(machine.find_text, Path("/proc/self/mounts")) or "")
    if tree.kind == "none":
        return failed(
            "no control groups are mounted: no container can start", fix="mount -t cgroup2 none /sys/fs/cgroup"
        )
    there = set(tree.v1)
    if tree.v2:
        there |= set((host.shell.call(machine.find_text, Path(tree.v2) / "cgroup.controllers") or "").split())
    if tree.kind == "version 2":
        there.add("devices")  # no controller there: libvirt does it with a BPF program
    missing = [name for name in NEEDED if name not in there]
    if missing:
        return warning(f"{tree.kind}, without {', '.join(missing)}: these limits do nothing")
    return ok(f"{tree.kind}, with {', '.join(NEEDED)}")


@check("cgroups as libvirt sees them")
def hybrid(host: Host) -> Outcome:
    """libvirt's LXC driver cannot start a container when it sees a version 2 tree beside version 1 and has no systemd."""
    if host.shell.call(files.exists, SYSTEMD):
        return ok("systemd arranges them")
    process = _find_daemon(host)
    if process is None:
        return warning("no libvirtd was found that could be looked at", fix="hvctl host setup")
    tree = parse_mounts(host.shell.call(machine.find_text, Path(f"/proc/{process}/mounts")) or "")
    if tree.kind == "hybrid":
        return warning(
            f"libvirtd (process {process}) sees the hybrid tree, without systemd: no container can start",
            fix=f"kill {process} && hvctl host setup",
        )
    return ok(f"libvirtd (process {process}) sees {tree.kind}")


def _find_daemon(host: Host) -> int | None:
    for path in PID_FILES:
        text = (host.shell.call(machine.find_text, path) or "").strip()
        if re.fullmatch(r"\d+", text) and host.shell.call(machine.find_text, Path(f"/proc/{text}/mounts")):
            return int(text)
    return None
