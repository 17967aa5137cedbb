"""Running a command inside a container: its namespaces (user namespace first), its control groups, its capabilities.

Three processes: this one waits, passes signals on and carries a terminal; a second one joins the namespaces; a third
one, born in the container's process namespace, becomes the command. From the moment a process has joined it imports
nothing more (the files are the container's now) and holds nothing of ours: it cannot be traced from inside
(prctl(2), PR_SET_DUMPABLE), has no controlling terminal of the host's (TIOCSTI), and every descriptor but the three
standard ones is closed. Those are no terminal of the host's, and the caller's keys (keyrings(7)) stay behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from hvctl.hostside import ending, freezer, groups, joining, relay

CAPTURED_BYTES = 64 * 1024 * 1024
"""So much a command may say to `capture`, on each stream."""
_BEGIN_TIMEOUT_S = 60
_KILL_TIMEOUT_S = 2
_ANSWER_TIMEOUT_S, _ANSWER_BYTES = 10.0, 64 * 1024
_END_OF_INPUT = b"\x04"  # as a terminal knows it


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


def ask(
    controller: int, argv: Sequence[str], environment: Mapping[str, str], *, limit_bytes: int = _ANSWER_BYTES
) -> tuple[int, bytes, bytes]:
    """`capture` for our own use: the program may be any by now, so neither its time nor what it says is left to it."""
    return capture(controller, argv, environment, b"", timeout_s=_ANSWER_TIMEOUT_S, limit_bytes=limit_bytes)


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
                joined = joining.Joined(init, descriptors, tell, channel.fileno() if channel else -1)
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
    before = {number: signal.signal(number, pass_on) for number in joining.PASSED_ON}
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


@contextlib.contextmanager
def _size_follows(ours: int, theirs: int) -> Iterator[None]:
    before = signal.signal(signal.SIGWINCH, lambda _signal, _frame: joining.take_size(ours, theirs))
    try:
        joining.take_size(ours, theirs)  # it may have changed since the terminal was opened
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
