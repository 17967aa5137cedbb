"""Running a command inside a container: its namespaces (user namespace first), its control groups, its capabilities.

Three processes: this one waits, passes signals on and carries a terminal; a second one joins the namespaces; a third
one, born in the container's process namespace, becomes the command. From the moment a process has joined it imports
nothing more (the files are the container's now) and holds nothing of ours: it cannot be traced from inside
(prctl(2), PR_SET_DUMPABLE), has no controlling terminal of the host's (TIOCSTI), and every descriptor but the three
standard ones is closed. Those are no terminal of the host's, and the caller's keys (keyrings(7)) stay behind.
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
import threading
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from hvctl.hostside import ending, freezer, groups, keyring, relay

CAPTURED_BYTES = 64 * 1024 * 1024
"""So much a command may say to `capture`, on each stream."""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_NAMESPACES = {"user": 0x10000000, "mnt": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000, "net": 0x40000000,
               "pid": 0x20000000}  # fmt: skip
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441
_PTMX_DEVICE = os.makedev(5, 2)
_GROUP = "hvctl-exec"
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_BEGIN_TIMEOUT_S = 60
_KILL_TIMEOUT_S = 2
_END_OF_INPUT = b"\x04"  # as a terminal knows it
_libc = ctypes.CDLL(None, use_errno=True)


def capture(
    controller: int,
    argv: Sequence[str],
    environment: Mapping[str, str],
    stdin: bytes,
    *,
    timeout_s: float | None = None,
    limit_bytes: int = CAPTURED_BYTES,
) -> tuple[int, bytes, bytes]:
    """Run a command with this input; its exit status and everything that it wrote to stdout and stderr.

    `controller` is the process of `libvirt_lxc` (libvirt's number of the domain). Raises what `run` raises, TimeoutError
    for one that has not ended in time, and OSError (EFBIG) for one that says more than the limit.
    """
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    out, err = _Kept(limit_bytes), _Kept(limit_bytes)
    with contextlib.ExitStack() as stack:
        given, said, complained = (_Pipe(stack) for _stream in range(3))
        theirs = (given.outlet, said.inlet, complained.inlet)
        command = stack.enter_context(_Command(controller, argv, environment, theirs, until_s=until_s))
        feed = relay.Feed(given.inlet, waiting=stdin)
        relay.relay(command.child, {said.outlet: out.add, complained.outlet: err.add}, feed, until_s=until_s)
        return command.wait(), out.content(), err.content()


def run(
    controller: int,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    streams: tuple[int, ...] = (0, 1, 2),
    with_terminal: bool = False,
) -> int:
    """Run a command as the container's root; its exit status, 128 + N when signal N ended it, 127 when it is not found.

    `streams` become its stdin, stdout and stderr, but none that is a terminal of the host's: what has one open can go on
    reading it when somebody types a password there, so it is copied. With a terminal the command has one of the
    container's, carried over to the first two. Signals that reach this process meanwhile go to the command. Raises OSError
    when the container is gone or cannot be entered.
    """
    until_s = time.monotonic() + _BEGIN_TIMEOUT_S
    with _passing_on() as pass_to, contextlib.ExitStack() as stack:
        if with_terminal:
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            command = stack.enter_context(
                _Command(controller, argv, environment, streams, channel=theirs, until_s=until_s)
            )
            pass_to(command.process)
            return _carry(command, ours, streams)
        ways = _Ways(streams, stack)
        command = stack.enter_context(_Command(controller, argv, environment, ways.theirs, until_s=until_s))
        pass_to(command.process)
        if ways.outputs or ways.feed:
            relay.relay(command.child, ways.outputs, ways.feed)
        return command.wait()


class _Kept:
    """What a command says, in memory, up to a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[bytes] = []
        self._size_bytes = 0

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._size_bytes += len(piece)
        if self._size_bytes > self._limit_bytes:
            raise OSError(errno.EFBIG, f"it says more than {self._limit_bytes} bytes")

    def content(self) -> bytes:
        return b"".join(self._pieces)


class _Pipe:
    """Both ends of a pipe, closed with the stack."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        outlet, inlet = os.pipe()
        self.outlet: IO[bytes] = stack.enter_context(os.fdopen(outlet, "rb", buffering=0))
        self.inlet: IO[bytes] = stack.enter_context(os.fdopen(inlet, "wb", buffering=0))


class _Ways:
    """How three streams get into a container: as they are, and a terminal by a pipe.

    theirs: what the command gets; outputs, feed: what is to be relayed to and from the terminals.
    """

    def __init__(self, streams: tuple[int, ...], stack: contextlib.ExitStack) -> None:
        keys, *screens = streams
        self.theirs: list[int | IO[bytes]] = [*streams]
        self.outputs: dict[IO[bytes], Callable[[bytes], None]] = {}
        self.feed: relay.Feed | None = None
        if os.isatty(keys):
            pipe = _Pipe(stack)
            self.theirs[0] = pipe.outlet
            self.feed = relay.Feed(pipe.inlet, keys=keys)
        by_terminal: dict[int, _Pipe] = {}  # one pipe for one terminal: what comes out keeps its order
        for number, screen in enumerate(screens, 1):
            if os.isatty(screen):
                terminal = os.fstat(screen).st_rdev
                pipe = by_terminal[terminal] = by_terminal.get(terminal) or _Pipe(stack)
                self.theirs[number] = pipe.inlet
                self.outputs[pipe.outlet] = relay.write_all(screen)


class _Command:
    """A command in a container, begun, seen from outside: killed where the block is left before it has ended.

    child: the second process; process: the third. Our side of what it was given, files and sockets, is closed.
    """

    def __init__(
        self,
        controller: int,
        argv: Sequence[str],
        environment: Mapping[str, str],
        streams: Sequence[int | IO[bytes]],
        *,
        channel: socket.socket | None = None,
        until_s: float | None,
    ) -> None:
        init = groups.find_init(controller)
        searched = environment.get("PATH", "/usr/bin:/bin").split(":")
        descriptors = tuple(stream if isinstance(stream, int) else stream.fileno() for stream in streams)
        told, tell = os.pipe()
        self._is_over = False
        self.child = os.fork()
        if self.child == 0:
            try:
                joined = _Joined(init, descriptors, tell, channel.fileno() if channel else -1)
                joined.become(list(argv), dict(environment), searched)
            except (OSError, ValueError) as error:
                os.write(tell, f"error {getattr(error, 'errno', 0) or 0} {error}".encode()[:1000])
            finally:
                os._exit(255)
        os.close(tell)
        for given in (*streams, channel):
            if given is not None and not isinstance(given, int):
                given.close()
        try:
            self.process = _read_told(told, until_s)
        except BaseException:
            self._kill()
            raise
        groups.spare(self.child)  # it can tell how the command ended; what it has started does not inherit it any more

    def __enter__(self) -> _Command:
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._is_over:
            self._kill()

    def wait(self) -> int:
        """Its exit status."""
        _pid, status = os.waitpid(self.child, 0)
        self._is_over = True
        return os.waitstatus_to_exitcode(status)

    def _kill(self) -> None:
        """The command goes with it (`_die_with`). In a container that is paused nobody dies before it goes on."""
        os.kill(self.child, signal.SIGKILL)
        if ending.ends_within(self.child, _KILL_TIMEOUT_S):
            os.waitpid(self.child, 0)


def kill_init(controller: int) -> None:
    """Kill a container's first process, and so all of it; fine when it has ended. Who is frozen goes on for that."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(groups.find_init(controller))
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if freezer.is_frozen(controller):
                freezer.thaw(controller)
            ending.is_over(handle, _KILL_TIMEOUT_S)
        finally:
            os.close(handle)
    groups.clear_scope(controller)


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


def _read_told(told: int, until_s: float | None) -> int:
    """The process that becomes the command, once it has; raises what went wrong before."""
    pieces: list[bytes] = []
    with os.fdopen(told, "rb", buffering=0) as stream:
        relay.read(stream, pieces.append, until_s=until_s)
    text = b"".join(pieces).decode(errors="replace")
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
        if len(received) > 1:  # nothing has begun that they could go to
            raise KeyboardInterrupt

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


def _carry(command: _Command, channel: socket.socket, streams: tuple[int, ...]) -> int:
    """Copy between our terminal and the command's until that one ends; every key goes over, Ctrl-C too. Its exit status."""
    _data, descriptors, _flags, _address = socket.recv_fds(channel, 1, 1)
    if not descriptors:
        return command.wait()
    keys, screen, *_rest = streams
    with os.fdopen(descriptors[0], "r+b", buffering=0) as master:
        with contextlib.ExitStack() as stack:
            if os.isatty(keys):
                before = termios.tcgetattr(keys)
                stack.callback(termios.tcsetattr, keys, termios.TCSADRAIN, before)
                stack.enter_context(_size_follows(keys, master.fileno()))
                tty.setraw(keys, termios.TCSANOW)
            feed = relay.Feed(master, keys=keys, end=_END_OF_INPUT)
            relay.relay(command.child, {master: relay.write_all(screen)}, feed)
        return command.wait()  # the terminal stays: it may have let go of it and run on


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
