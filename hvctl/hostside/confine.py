"""What holds a container that libvirt does not do: limits where the container's root cannot lift them.

Two kinds of host (cgroups(7)):

- **version 1, nobody managing it** (a CI runner): the files of a group are root's, so libvirt's own limits hold. There
  is no number of processes in libvirt-LXC, and no group of the hierarchy `name=systemd` for the systemd inside: the
  emulator wrapper (`emulator.py`) makes both and is in them before the container begins.
- **version 2 under systemd**: libvirt gives the container's root the files of its own group, `memory.max` among them.
  So the same limits stand on the scope around it, whose files stay root's; systemd sets them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from hvctl.hostside import files

NOTES = Path("/run/hvctl-containers")
"""One file for each container that starts or runs, named after it: what the emulator wrapper must know."""
DEFAULT_PROCESSES = 4096
"""Processes and threads of a container for which nothing else was asked."""
_TIMEOUT_S = 20
_FOLDER = "hvctl"
_JOINED = ("name=systemd", "pids")


@dataclass(frozen=True)
class Limits:
    """What one container may use."""

    first_id: int
    """Its first uid outside; 0 for a privileged one."""
    memory_bytes: int
    cpus: int
    processes: int


def note(name: str, uuid: str, limits: Limits) -> None:
    """Tell the emulator wrapper of a container that is about to start."""
    files.make_directory(NOTES, 0o700)
    files.write_file(NOTES / name, json.dumps({"uuid": uuid, **asdict(limits)}).encode(), 0o600)


def join(name: str) -> None:
    """Put this process, which becomes the container's controller, into groups of its own in the version 1 tree."""
    content = json.loads(files.read_file(NOTES / name))
    uuid, limits = content.pop("uuid"), Limits(**content)
    for controller, tree in find_hierarchies().items():
        if controller not in _JOINED:
            continue
        group = tree / _FOLDER / uuid
        group.mkdir(parents=True, exist_ok=True)
        if controller == "pids":
            (group / "pids.max").write_text(str(limits.processes))
        else:  # the systemd inside makes its groups here
            for path in (group, group / "cgroup.procs", group / "tasks"):
                os.chown(path, limits.first_id, limits.first_id)
        (group / "cgroup.procs").write_text(str(os.getpid()))


def hold(controller: int, limits: Limits) -> None:
    """Put these limits around a container that runs, given the process of its controller; fine when they are there."""
    scope = find_scope(controller)
    if scope:
        words = [
            *("systemctl", "set-property", "--runtime", "--", scope),
            f"MemoryMax={limits.memory_bytes}",
            f"TasksMax={limits.processes}",
            f"CPUQuota={limits.cpus * 100}%",
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise OSError(f"systemd refused the limits: {done.stderr.strip()[:300]}")
        return
    group = _group_of(controller, "pids")
    if group is not None:
        (group / "pids.max").write_text(str(limits.processes))


def release(name: str, uuid: str) -> None:
    """Remove what a container that has ended left: our groups, and libvirt's where it died with the container."""
    with contextlib.suppress(FileNotFoundError):
        (NOTES / name).unlink()
    mine = re.compile(rf"lxc-\d+-{re.escape(name)}\.libvirt-lxc")
    for tree in set(find_hierarchies().values()):
        remove_group(tree / _FOLDER / uuid)
        for group in (tree / "machine").glob("lxc-*"):
            if mine.fullmatch(group.name):
                remove_group(group)


def remove_group(group: Path) -> None:
    """Remove a group with all below it; those with processes in them stay."""
    for folder, _folders, _files in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def find_hierarchies() -> dict[str, Path]:
    """Controller (or `name=systemd`) -> where its version 1 tree is mounted, as this process sees it."""
    found = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, path, kind, options, *_rest = line.split(" ")
        if kind == "cgroup":
            found.update({option: Path(path) for option in options.split(",")})
    return found


def find_unified() -> Path | None:
    """Where the version 2 tree is mounted, as this process sees it."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, path, kind, *_rest = line.split(" ")
        if kind == "cgroup2":
            return Path(path)
    return None


def find_scope(controller: int) -> str:
    """The systemd scope that a container's controller is in, or an empty string: another kind of host."""
    for line in Path(f"/proc/{controller}/cgroup").read_text().splitlines():
        _number, names, path = line.split(":", 2)
        scope = re.search(r"/(machine-[^/]+\.scope)(?:/|$)", path)
        if not names and scope:
            return scope.group(1)
    return ""


def _group_of(process: int, controller: str) -> Path | None:
    tree = find_hierarchies().get(controller)
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        _number, names, path = line.split(":", 2)
        if tree is not None and controller in names.split(","):
            return tree / path.lstrip("/")
    return None
