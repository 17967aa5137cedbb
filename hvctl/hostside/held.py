"""The limits that hold a running container now, as its control groups have them (cgroups(7)), whatever its definition says."""

from __future__ import annotations

import contextlib
import os

from hvctl.hostside import groups

_LIMITING = frozenset(("cpu", "memory", ""))
_NO_LIMIT_BYTES = 2**60
"""Version 1 says "unlimited" with a number of pages that nobody has."""


def read_limits(controller: int) -> tuple[int, int]:
    """CPUs and bytes of memory, given the process of a container's controller; 0 for what is not limited, or cannot be read."""
    cpus, memory_bytes = [], []
    with contextlib.suppress(OSError):  # it has ended, or these are not this user's to read
        trees = groups.find_trees()
        for names, path in groups.find_memberships(controller):
            for kind in _LIMITING.intersection(names.split(",")):
                for group in _list_groups(trees.get(kind, ""), path):
                    cpus.append(_read_cpus(group))
                    memory_bytes.append(_read_memory(group))
    return min(filter(None, cpus), default=0), min(filter(None, memory_bytes), default=0)


def read_kept(controller: int) -> int:
    """Bytes of memory that the kernel cannot take back from a container, given the process of its controller.

    0 with version 1 of control groups, which refuses a limit that is lower; version 2 takes it, and kills until it holds.
    """
    kept = [0]
    with contextlib.suppress(OSError):
        tree = groups.find_unified()
        for names, path in groups.find_memberships(controller):
            if not names:
                kept += map(_read_kept, _list_groups(tree, path))
    return max(kept)


def _read_kept(group: str) -> int:
    used = _read(f"{group}/memory.current")
    if not used:
        return 0
    counted = dict(line.split(" ", 1) for line in _read(f"{group}/memory.stat").splitlines())
    return int(used) - sum(int(counted.get(name, "0")) for name in ("active_file", "inactive_file"))


def _list_groups(tree: str, path: str) -> list[str]:
    """The container's own group and, where systemd has made one around it, that scope; not what all of them share."""
    if not tree or path == "/":
        return []
    return [f"{tree}{path}", *([f"{tree}{os.path.dirname(path)}"] if ".scope/" in path else [])]


def _read_memory(group: str) -> int:
    for name in ("memory.limit_in_bytes", "memory.max"):
        text = _read(f"{group}/{name}")
        if text.isdigit():
            return int(text) if int(text) < _NO_LIMIT_BYTES else 0
    return 0


def _read_cpus(group: str) -> int:
    quota, _, period = _read(f"{group}/cpu.max").partition(" ")
    if not quota:
        quota, period = (_read(f"{group}/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) // int(period) if quota.isdigit() and period.isdigit() else 0


def _read(path: str) -> str:
    try:
        with open(path) as stream:
            return stream.read().strip()
    except FileNotFoundError:
        return ""
