"""Control groups of containers (cgroups(7)): which a process is in, and ours where nobody manages version 1 trees."""

from __future__ import annotations

import contextlib
import functools
import os

NOTES = "/run/hvctl-containers"
"""One file for each container that starts or runs, named after it: the `tasks` files through which it joins our groups."""
_FOLDER = "hvctl"
TASKS = "tasks"
"""The file of a version 1 group through which a process of one thread moves itself there with a "0". The kernel then need
not hold up every fork on the host (cgroup_procs_write_start): by way of `cgroup.procs` that was seen to take 5 to 14 ms."""
UNLIKELY_VICTIM, LIKELY_VICTIM = "-999", "500"
"""Values of `oom_score_adj`: thousandths of the group's limit that count as memory used, when somebody must be killed."""
_LONGEST_MACHINE = 64  # HOST_NAME_MAX


def write(path: str, text: str) -> None:
    """Write into a file of a group, at once."""
    with open(path, "w") as stream:
        stream.write(text)


def spare(process: int) -> None:
    """Have the kernel end anything else first when the memory of this process's group runs out (proc_pid_oom_score_adj(5)).

    What it starts from then on inherits that. Root without CAP_SYS_RESOURCE (in some CI runner) may not lower it
    below 0; there it helps against processes that were made likelier victims (`LIKELY_VICTIM`, `resemble`). Fine when it
    has ended.
    """
    for value in (UNLIKELY_VICTIM, "0"):
        with contextlib.suppress(OSError):
            write(f"/proc/{process}/oom_score_adj", value)
            return


def resemble(process: int) -> None:
    """Be as likely a victim as that process is."""
    with open(f"/proc/{process}/oom_score_adj") as stream, contextlib.suppress(PermissionError):
        write("/proc/self/oom_score_adj", stream.read())


def find_own(tree: str, uuid: str) -> str:
    """The group that we make for a container in one tree."""
    return f"{tree}/{_FOLDER}/{uuid}"


def is_libvirts(group: str, name: str) -> bool:
    """Whether libvirt names the group of a container of this name so, where it makes it itself.

    As virDomainGenerateMachineName does: `lxc-NUMBER-NAME`, without the signs that a host's name may not have, without a
    second of `-` and `.` in a row, and at most 64 characters.
    """
    import re

    found = re.fullmatch(r"(lxc-\d+-)(.*)\.libvirt-lxc", group)
    if found is None:
        return False
    kept = re.sub(r"([-.])[-.]+", r"\1", re.sub(r"[^A-Za-z0-9.-]", "", name))
    return found[2] == kept[: _LONGEST_MACHINE - len(found[1])]


def remove(group: str) -> None:
    """Remove a group with all below it; those with processes in them stay.

    By find(1), for what a container has made in its own may be of any depth.
    """
    with contextlib.suppress(OSError):
        os.rmdir(group)
    if os.path.isdir(group):
        words = ["find", group, "-depth", "-type", "d", "-delete"]
        with open(os.devnull, "r+b") as nowhere:
            streams = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), number) for number in range(3)]
            os.waitpid(os.posix_spawnp(words[0], words, os.environ, file_actions=streams), 0)


def clear_scope(controller: int) -> None:
    """Remove the empty groups of a container whose scope systemd has made; libvirt ends none with too deep ones.

    Made before it was limited, say. By the number in the scope's name: the process may be gone.
    """
    import glob

    for scope in glob.glob(f"{find_unified()}/machine.slice/machine-lxc\\x2d{controller}\\x2d*.scope/*/"):
        remove(scope.rstrip("/"))


def find_hierarchies() -> dict[str, str]:
    """Controller (or `name=systemd`) -> where its version 1 tree is mounted, as this process sees it."""
    found = {}
    for path, kind, options in _mounts():
        if kind == "cgroup":
            found.update(dict.fromkeys(options.split(","), path))
    return found


def find_trees() -> dict[str, str]:
    """As `find_memberships` names controllers: where each one's tree is mounted; none: version 2."""
    return {**find_hierarchies(), "": find_unified()}


def find_init(controller: int) -> int:
    """The first process of a container, given that of its controller. Raises OSError when there is none."""
    with open(f"/proc/{controller}/task/{controller}/children") as stream:
        children = stream.read().split()
    if not children:
        raise ProcessLookupError("the container has ended")
    return int(children[0])


def find_memberships(process: int) -> list[tuple[str, str]]:
    """Controllers (comma-separated; none: version 2) and path, for each tree (cgroups(7), /proc/PID/cgroup)."""
    lines = read_lines(f"/proc/{process}/cgroup")
    return [(names, path) for _number, names, path in (line.split(":", 2) for line in lines)]


def find_unified() -> str:
    """Where the version 2 tree is mounted, as this process sees it, or an empty string."""
    return next((path for path, kind, _options in _mounts() if kind == "cgroup2"), "")


@functools.cache
def _mounts() -> list[tuple[str, str, str]]:
    """Path, kind and options; read once: the trees of groups stay where they are while a process lives."""
    lines = [line.split(" ") for line in read_lines("/proc/self/mounts")]
    return [(words[1], words[2], words[3]) for words in lines]


def read_lines(path: str) -> list[str]:
    """The lines of a file of the kernel's. The names in it, a container's too, may be of any bytes but a newline."""
    with open(path, errors="surrogateescape", newline="\n") as stream:
        return stream.read().split("\n")[:-1]
