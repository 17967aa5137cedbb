"""Starting libvirt's daemons on a host without systemd (a CI runner in a container or small VM).

libvirt's LXC driver fails under the hybrid cgroup tree ("Unable to create directory /sys/fs/cgroup/unified"); there,
libvirtd lives in a mount namespace of its own without that mount. The namespace is pinned to a file and every later
libvirtd enters the same one, because in a fresh one it would not see the mounts that its containers stand on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

from hvctl.hostside import files, groups

RUN = Path("/run/hvctl")
"""Of the machine, not of a store: there is one libvirtd."""
NAMESPACE = RUN / "namespaces" / "libvirtd"
STARTED = RUN / "daemons.json"
NOTICED = RUN / "hooks-noticed"
"""Which libvirtd was told of hooks that are younger than itself: `PROCESS START`."""
_HYBRID = "/sys/fs/cgroup/unified"
LXCFS = Path("/var/lib/lxcfs")
_LXCFS_PROGRAMS = ("/usr/bin/lxcfs", "/usr/local/bin/lxcfs")
_TIMEOUT_S = 30
_LXCFS_TIMEOUT_S = 5


def has_systemd() -> bool:
    """Whether systemd is the init of this host (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def find_running(name: str) -> int:
    """The process of a daemon of this name, or 0. By its own pid file: a daemon's children have its name, too."""
    try:
        process = int(Path(f"/run/{name}.pid").read_text())
        return process if Path(f"/proc/{process}/comm").read_text().strip() == name else 0
    except (OSError, ValueError):
        return 0


def is_hybrid() -> bool:
    """Whether the cgroup v2 tree is mounted beside v1, where libvirt 9's LXC driver stumbles over it."""
    return any(line.split(" ")[1] == _HYBRID for line in groups.read_lines("/proc/self/mounts"))


def start_virtlogd() -> None:
    """Start virtlogd, which keeps the guests' console logs."""
    _run(["virtlogd", "-d"])
    _remember("virtlogd")


def start_libvirtd() -> None:
    """Start libvirtd, in its pinned namespace where the hybrid tree makes that necessary."""
    if not is_hybrid():
        _run(["libvirtd", "-d"])
    elif _is_pinned():
        _run([*_in_namespace(), "libvirtd", "-d"])
    else:
        _make_pin()
        _run_pinned(f"umount {_HYBRID} && exec libvirtd -d")
    _remember("libvirtd")
    _note_noticed(find_running("libvirtd"))  # it read all hooks that there are


def has_lxcfs() -> bool:
    """Whether lxcfs is installed, which shows a container its own memory, CPUs and uptime in /proc."""
    return _find_lxcfs() != ""


def ensure_lxcfs() -> None:
    """Let lxcfs serve in libvirtd's mount namespace, or in this one where libvirtd has none of its own; fine when it does.

    Raises OSError when it is not installed or does not come up. Containers that run keep the one they began with.
    """
    if _is_serving():
        return
    program = _find_lxcfs()
    if not program:
        raise OSError("lxcfs is not installed, and this container was made with it")
    is_ours = not has_systemd()
    if not is_ours:
        _run(["systemctl", "restart", "lxcfs.service"])
    else:
        # One that was killed leaves a mount that answers nothing; another would not mount over it.
        _run([*_in_namespace(), "sh", "-c", f"umount --lazy {LXCFS} 2> /dev/null; mkdir -p {LXCFS}"])
        words = [*_in_namespace(), program, str(LXCFS)]
        import subprocess  # here, and below: most starts of a container have no use for it

        nowhere = subprocess.DEVNULL
        subprocess.Popen(words, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True, cwd="/")
    deadline_s = time.monotonic() + _LXCFS_TIMEOUT_S
    while not _is_serving():
        if time.monotonic() > deadline_s:
            raise OSError("lxcfs was started but does not serve")
        time.sleep(0.005)  # it goes into no background and tells nobody
    if is_ours:
        _remember("lxcfs")


def has_noticed(hook: Path) -> bool:
    """Whether the libvirtd that runs, if one does, knows of this hook: it looks for hooks when it starts."""
    process = find_running("libvirtd")
    if not process:
        return True
    started = _start_time(process)
    boot_s = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
    started_s = int(boot_s.group(1) if boot_s else 0) + int(started or 0) / os.sysconf("SC_CLK_TCK")
    installed_s = hook.stat().st_mtime
    told = NOTICED.read_text() if NOTICED.exists() and NOTICED.stat().st_mtime >= installed_s else ""
    return started_s > installed_s + 1 or told == f"{process} {started}"


def reload_libvirtd(hook: Path) -> None:
    """Let a running libvirtd notice a hook that is younger than itself (SIGHUP, https://libvirt.org/hooks.html)."""
    process = find_running("libvirtd")
    if process and not has_noticed(hook):
        os.kill(process, signal.SIGHUP)
        _note_noticed(process)


def list_started() -> list[str]:
    """Names of the daemons that were started here and still run."""
    return [name for name, (process, started) in _started().items() if _start_time(process) == started]


def stop_started() -> None:
    """End the daemons that were started here; guests go on running without them."""
    for process, started in _started().values():
        if _start_time(process) == started:
            os.kill(process, signal.SIGTERM)
            _wait_gone(process)
    if _is_pinned():
        _run(["umount", str(NAMESPACE)])
        _run(["umount", str(NAMESPACE.parent)])
    files.remove(NAMESPACE.parent)
    for path in (STARTED, NOTICED):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a store's locks may be in there
        RUN.rmdir()


def _note_noticed(process: int) -> None:
    RUN.mkdir(exist_ok=True)
    NOTICED.write_text(f"{process} {_start_time(process)}")


def _make_pin() -> None:
    """A file that can hold a mount namespace: it must lie on a private mount (unshare(1), --mount=FILE)."""
    NAMESPACE.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(NAMESPACE.parent):
        _run(["mount", "--bind", str(NAMESPACE.parent), str(NAMESPACE.parent)])
        _run(["mount", "--make-private", str(NAMESPACE.parent)])
    NAMESPACE.touch()


def _run_pinned(script: str) -> None:
    """Run a shell script in a new mount namespace, and pin that.

    A namespace can only be pinned in an older one (EINVAL). Linux 6.18 numbers them, and each CPU has numbers in store: for
    us, where we live in a namespace that a container runtime has just made, an older number may come from another CPU.
    One that began on the same CPU as ours has a greater one for certain.
    """
    words = ["unshare", f"--mount={NAMESPACE}", "--propagation", "slave", "sh", "-c"]
    allowed = sorted(os.sched_getaffinity(0))
    anywhere = ",".join(map(str, allowed))
    attempts = [[*words, script]]
    back = f"taskset --pid --cpu-list {anywhere} $$ > /dev/null && {script}"
    attempts += [["taskset", "--cpu-list", str(cpu), *words, back] for cpu in allowed]
    for number, argv in enumerate(attempts, 1):
        try:
            _run(argv)
            return
        except OSError as error:
            if number == len(attempts) or "Invalid argument" not in str(error):
                raise


def _find_lxcfs() -> str:
    return next((path for path in _LXCFS_PROGRAMS if os.access(path, os.X_OK)), "")


def _is_serving() -> bool:
    """Whether its process runs and has mounted itself where libvirtd looks."""
    process = find_running("lxcfs")
    if not process:
        return False
    try:
        lines = groups.read_lines(f"/proc/{process}/mounts")
    except OSError:  # it has ended, and nobody has asked how
        return False
    return any(line.split(" ")[1:3] == [str(LXCFS), "fuse.lxcfs"] for line in lines)


def _in_namespace() -> list[str]:
    return ["nsenter", f"--mount={NAMESPACE}"] if _is_pinned() else []


def _is_pinned() -> bool:
    return any(line.split(" ")[4] == str(NAMESPACE) for line in groups.read_lines("/proc/self/mountinfo"))


def _run(argv: list[str]) -> None:
    import subprocess

    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=_TIMEOUT_S,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},  # what they say is read, and what the daemons say, too
    )
    if done.returncode != 0:
        raise OSError(f"{argv[0]} failed: {done.stderr.decode(errors='replace').strip()[-300:]}")


def _remember(name: str) -> None:
    """Note which process is ours, with its start time: a number alone may be another's by then."""
    import json  # here: libvirt's hook has no use for it

    RUN.mkdir(exist_ok=True)
    process = find_running(name)
    STARTED.write_text(json.dumps({**_started(), name: (process, _start_time(process))}))


def _started() -> dict[str, tuple[int, str]]:
    import json

    try:
        return {
            name: (int(process), str(started)) for name, (process, started) in json.loads(STARTED.read_text()).items()
        }
    except (FileNotFoundError, ValueError):
        return {}


def _start_time(process: int) -> str:
    """Field 22 of proc(5)'s stat; empty when there is no such process, or it has ended and nobody has asked how."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _wait_gone(process: int) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while _start_time(process) and time.monotonic() < deadline_s:
        time.sleep(0.02)  # not our child: there is nobody to tell us
