"""Running a command inside a container: its namespaces (user namespace first), its control groups, its capabilities.

Three processes: this one waits, passes signals on and carries a terminal; a second one joins the namespaces; a third
one, born in the container's process namespace, becomes the command. From the moment a process has joined it imports
nothing more (the files are the container's now) and holds nothing of ours: it cannot be traced from inside
(prctl(2), PR_SET_DUMPABLE), has no controlling terminal of the host's (TIOCSTI), and every descriptor but the three
standard ones is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hvctl.hostside import groups

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_NAMESPACES = {"user": 0x10000000, "mnt": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000, "net": 0x40000000,
               "pid": 0x20000000}  # fmt: skip
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441
_PTMX_DEVICE = os.makedev(5, 2)
_GROUP = "hvctl-exec"
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_libc = ctypes.CDLL(None, use_errno=True)


def capture(
    controller: int, argv: Sequence[str], environment: Mapping[str, str], stdin: bytes
) -> tuple[int, bytes, bytes]:
    """Run a command with this input; its exit status and everything that it wrote to stdout and stderr.

    `controller` is the process of `libvirt_lxc` (libvirt's number of the domain). Raises what `run` raises.
    """
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(os.fdopen(os.memfd_create("hvctl"), "w+b")) for _end in range(3)]
        ends[0].write(stdin)
        ends[0].flush()
        ends[0].seek(0)
        status = run(controller, argv, environment, streams=tuple(end.fileno() for end in ends))
        for end in ends:
            end.seek(0)
        return status, ends[1].read(), ends[2].read()


def run(
    controller: int,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    streams: tuple[int, ...] = (0, 1, 2),
    with_terminal: bool = False,
) -> int:
    """Run a command as the container's root; its exit status, 128 + N when signal N ended it, 127 when it is not found.

    `streams` become its stdin, stdout and stderr; with a terminal it has one of the container's, carried over to the
    first two. Signals that reach this process meanwhile go to the command. Raises OSError when the container is gone
    or cannot be entered.
    """
    init = groups.find_init(controller)
    told, tell = os.pipe()
    ours, theirs = socket.socketpair()
    environment = dict(environment)
    searched = environment.get("PATH", "/usr/bin:/bin").split(":")
    with contextlib.closing(ours), _passing_on() as pass_to:
        child = os.fork()
        if child == 0:
            try:
                joined = _Joined(init, streams, tell, theirs.fileno() if with_terminal else -1)
                joined.become(list(argv), environment, searched)
            except (OSError, ValueError) as error:
                os.write(tell, f"error {getattr(error, 'errno', 0) or 0} {error}".encode()[:1000])
            finally:
                os._exit(255)
        os.close(tell)
        theirs.close()
        try:
            process = _read_told(told)
            groups.spare(child)  # it can tell how the command ended; what it has started does not inherit it any more
            pass_to(process)
        except OSError:
            os.waitpid(child, 0)
            raise
        if with_terminal:
            _carry(ours, streams)
        _pid, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_init(controller: int) -> None:
    """Kill a container's first process, and so all of it; fine when it has ended."""
    with contextlib.suppress(OSError):
        os.kill(groups.find_init(controller), signal.SIGKILL)


class _Joined:
    """The second process: prepared outside, then inside for good."""

    def __init__(self, init: int, streams: tuple[int, ...], tell: int, channel: int) -> None:
        self.streams = streams
        self.tell = tell
        self.channel = channel
        self.dropped = _dropped_capabilities(init)
        parent = os.getppid()
        for number in _PASSED_ON:  # a terminal sends them to all of us, and one of us passes them on
            signal.signal(number, signal.SIG_IGN)
        _check(_libc.prctl(_PR_SET_DUMPABLE, 0))
        handle = os.pidfd_open(init)
        _close_all_but({0, 1, 2, *streams, tell, channel, handle})
        _join_groups(init)
        groups.resemble(init)
        _take_label(init)
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
        for number in (*_PASSED_ON, signal.SIGPIPE, signal.SIGXFSZ):
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
    _take_size(keys, terminal)  # before the command can ask
    with socket.socket(fileno=channel) as end:
        socket.send_fds(end, [b"t"], [master])
    os.close(master)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    return terminal


def _dropped_capabilities(init: int) -> list[int]:
    """What the container's own first process may never have: neither may a command (capabilities(7), bounding set)."""
    kept = 0
    for line in Path(f"/proc/{init}/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            kept = int(line.split()[1], 16)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    return [number for number in range(last + 1) if not kept >> number & 1]


def _join_groups(init: int) -> None:
    """Where the container is limited, so is the command. The groups that the systemd inside manages get one more leaf."""
    trees = groups.find_trees()
    for line in Path(f"/proc/{init}/cgroup").read_text().splitlines():
        _number, names, path = line.split(":", 2)
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


def _read_told(told: int) -> int:
    """The process that becomes the command, once it has; raises what went wrong before."""
    with os.fdopen(told, "rb") as stream:
        text = stream.read().decode(errors="replace")
    process = 0
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "process":
            process = int(rest)
        else:
            number, _, reason = rest.partition(" ")
            raise OSError(int(number or 0) or errno.EIO, reason or "the container cannot be entered")
    return process


@contextlib.contextmanager
def _passing_on() -> Iterator[Callable[[int], None]]:
    """Pass the signals that we get in the block on to the command, once the function it gives was told its process."""
    received: list[int] = []
    processes: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        deliver()

    def deliver() -> None:
        while received and processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[0], received.pop(0))

    def pass_to(process: int) -> None:
        if process:  # 0: it never came to be
            processes.append(process)
            deliver()

    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield lambda _process: None
        return
    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield pass_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _carry(channel: socket.socket, streams: tuple[int, ...]) -> None:
    """Copy between our terminal and the command's until that one ends; every key goes over, Ctrl-C too."""
    _data, descriptors, _flags, _address = socket.recv_fds(channel, 1, 1)
    if not descriptors:
        return
    master, (keys, screen, *_rest) = descriptors[0], streams
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, master)
        if os.isatty(keys):
            before = termios.tcgetattr(keys)
            stack.callback(termios.tcsetattr, keys, termios.TCSADRAIN, before)
            stack.enter_context(_size_follows(keys, master))
            tty.setraw(keys, termios.TCSANOW)
        _copy(keys, screen, master)


def _copy(keys: int, screen: int, master: int) -> None:
    sources = [master, keys]
    while True:
        for source in select.select(sources, [], [])[0]:
            try:
                data = os.read(source, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # the last one on its side has closed it
                    raise
                data = b""
            if source == master and not data:
                return
            if not data:
                sources.remove(keys)
                data = b"\x04"  # the end of input, as a terminal knows it
            _write_all(screen if source == master else master, data)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _take_size(ours: int, theirs: int) -> None:
    with contextlib.suppress(OSError):  # only terminals have one
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, fcntl.ioctl(ours, termios.TIOCGWINSZ, b"\0" * 8))


@contextlib.contextmanager
def _size_follows(ours: int, theirs: int) -> Iterator[None]:
    before = signal.signal(signal.SIGWINCH, lambda _signal, _frame: _take_size(ours, theirs))
    try:
        _take_size(ours, theirs)  # it may have changed since the terminal was opened
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
