"""Inside a container, on the way to a command: the second and the third process that `enter.py` speaks of.

Everything that is needed from outside is read before the namespaces are joined. From then on nothing is imported, no path
is trusted, and nothing of the host's is held but what the command is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import stat
import struct
import termios
from pathlib import Path

from hvctl.hostside import groups, keyring

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_NAMESPACES = {"user": 0x10000000, "mnt": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000, "net": 0x40000000,
               "pid": 0x20000000}  # fmt: skip
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441
_PTMX_DEVICE = os.makedev(5, 2)
_GROUP = "hvctl-exec"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_libc = ctypes.CDLL(None, use_errno=True)


class Joined:
    """The second process: prepared outside, then inside for good."""

    def __init__(self, init: int, streams: tuple[int, ...], tell: int, channel: int) -> None:
        self.streams = streams
        self.tell = tell
        self.channel = channel
        self.dropped = _dropped_capabilities(init)
        parent = os.getppid()
        for number in PASSED_ON:  # a terminal sends them to all of us, and one of us passes them on
            signal.signal(number, signal.SIG_IGN)
        _check(_libc.prctl(_PR_SET_DUMPABLE, 0))
        handle = os.pidfd_open(init)
        _close_all_but({0, 1, 2, *streams, tell, channel, handle})
        _join_groups(init)
        groups.resemble(init)
        _take_label(init)
        keyring.leave()
        flags = 0
        for name, flag in _NAMESPACES.items():
            if os.readlink(f"/proc/self/ns/{name}") != os.readlink(f"/proc/{init}/ns/{name}"):
                flags |= flag
        _check(_libc.setns(handle, flags))
        os.close(handle)
        _die_with(parent, signal.SIGKILL)

    def become(self, argv: list[str], environment: dict[str, str], searched: list[str]) -> None:
        """Start the command and end as it ends."""
        command = os.fork()
        if command == 0:
            self._exec(argv, environment, searched)
        os.write(self.tell, f"process {command}\n".encode())
        for descriptor in {self.tell, self.channel, *self.streams} - {-1}:
            os.close(descriptor)
        _pid, status = os.waitpid(command, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)

    def _exec(self, argv: list[str], environment: dict[str, str], searched: list[str]) -> None:
        for capability in self.dropped:
            _check(_libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))
        os.setgroups([0])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.setsid()
        _die_with(os.getppid(), signal.SIGHUP)
        streams = self.streams if self.channel < 0 else (_open_terminal(self.channel, self.streams[0]),) * 3
        _place(streams)
        with contextlib.suppress(OSError):
            os.chdir(environment.get("HOME", "/"))
        for number in (*PASSED_ON, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.umask(0o022)
        failure = _exec_found(argv, environment, searched)
        os.write(2, f"exec: {argv[0]!r}: {failure.strerror}\n".encode())
        os._exit(_NOT_FOUND if failure.errno in (errno.ENOENT, errno.ENOTDIR) else _NOT_EXECUTABLE)


def _die_with(parent: int, number: int) -> None:
    """Get this signal when the parent ends. Any change of credentials takes that back, so it comes after the last one."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, number))
    if os.getppid() != parent:
        os._exit(255)


def _place(streams: tuple[int, ...]) -> None:
    """Make these stdin, stdout and stderr, whatever numbers they have now, and close everything else when it execs."""
    copies = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, 16) for stream in streams]
    for number, copy in enumerate(copies):
        os.dup2(copy, number, inheritable=True)


def _exec_found(argv: list[str], environment: dict[str, str], searched: list[str]) -> OSError:
    """Like execvpe(3), which in Python imports a module: the first failure that is not "not there", or that."""
    paths = [argv[0]] if "/" in argv[0] else [f"{folder}/{argv[0]}" for folder in searched]
    failure = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in paths:
        try:
            os.execve(path, argv, environment)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
        except ValueError as error:  # a NUL in a word
            return OSError(errno.EINVAL, str(error))
    return failure


def _open_terminal(channel: int, keys: int) -> int:
    """A terminal of the container's, ours from now on and as large as `keys`; its other end goes out by the channel."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    facts = os.fstat(master)
    if not stat.S_ISCHR(facts.st_mode) or facts.st_rdev != _PTMX_DEVICE:
        raise OSError(errno.ENXIO, "the container has no /dev/ptmx")
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    terminal = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    take_size(keys, terminal)  # before the command can ask
    with socket.socket(fileno=channel) as end:
        socket.send_fds(end, [b"t"], [master])
    os.close(master)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    return terminal


def _dropped_capabilities(init: int) -> list[int]:
    """What the container's own first process may never have: neither may a command (capabilities(7), bounding set)."""
    kept = 0
    for line in groups.read_lines(f"/proc/{init}/status"):
        if line.startswith("CapBnd:"):
            kept = int(line.split()[1], 16)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    return [number for number in range(last + 1) if not kept >> number & 1]


def _join_groups(init: int) -> None:
    """Where the container is limited, so is the command. The groups that the systemd inside manages get one more leaf."""
    trees = groups.find_trees()
    for names, path in groups.find_memberships(init):
        tree = trees.get(names.split(",")[0])
        if not tree or path == "/":
            continue
        group = f"{tree}{path}"
        if group.endswith("/init.scope"):
            group = f"{group.removesuffix('/init.scope')}/{_GROUP}"
            os.makedirs(group, exist_ok=True)
        groups.write(f"{group}/{groups.TASKS if names else 'cgroup.procs'}", "0")


def _take_label(init: int) -> None:
    """AppArmor confines the command as it does the container's first process, from its exec on."""
    attributes = Path("/proc/self/attr/apparmor")
    with contextlib.suppress(OSError):
        label = (Path(f"/proc/{init}/attr/apparmor") / "current").read_text().split(" (")[0].strip("\0\n")
        if label and label != "unconfined":
            (attributes / "exec").write_text(f"exec {label}")


def _close_all_but(kept: set[int]) -> None:
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) not in kept:
            with contextlib.suppress(OSError):  # the one that the list was read with
                os.close(int(entry))


def take_size(ours: int, theirs: int) -> None:
    with contextlib.suppress(OSError):  # only terminals have one
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, fcntl.ioctl(ours, termios.TIOCGWINSZ, b"\0" * 8))


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
