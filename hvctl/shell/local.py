"""The shell of this machine: subprocesses with a deadline, and direct calls."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from hvctl.errors import CommandFailed, HostError, HvctlError, TimedOut
from hvctl.hostside import locks
from hvctl.hostside.ending import ends_within
from hvctl.shell.base import Argument, Completed, P, R, Shell

log = logging.getLogger(__name__)

_STDERR_LINES_IN_MESSAGE = 6


class LocalShell(Shell):
    """Runs everything here, as the user that we are."""

    def run(
        self,
        argv: Sequence[Argument],
        *,
        timeout_s: float,
        stdin: bytes = b"",
        check: bool = True,
        on_line: Callable[[str], None] | None = None,
    ) -> Completed:
        words = tuple(os.fspath(word) for word in argv)
        log.debug("run: %s", shlex.join(words))
        started_s = time.monotonic()
        with _start(words) as process:
            done = _communicate(process, words, stdin, timeout_s, on_line)
        log.debug("run: %s ended with %d after %.2f s", words[0], done.status, time.monotonic() - started_s)
        if check and done.status != 0:
            raise _failure(done)
        return done

    def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise host_error(error) from error
        except RecursionError as error:  # whoever made the tree was somebody inside
            raise HostError("directories are nested too deeply to be read") from error


def host_error(error: OSError) -> HvctlError:
    """An operating system error in words, with what to do about it where that is known."""
    where = f" {os.fsdecode(error.filename)!r}" if error.filename else ""
    reason = error.strerror or str(error)
    hint = {
        errno.ENOSPC: "free some space, or move the store: see `hvctl host doctor`",
        errno.EDQUOT: "free some space, or raise the quota",
        errno.EACCES: "run it as root",
        errno.EPERM: "run it as root",
        errno.EROFS: "the file system is mounted read-only",
    }.get(error.errno or 0, "")
    return HostError(f"cannot use{where}: {reason}", hint=hint)


@contextlib.contextmanager
def _start(words: tuple[str, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a process group of its own, killed with all that it started when the block is left early."""
    try:
        with locks.lending() as held:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=held,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
    except FileNotFoundError as error:
        raise HostError(
            f"the program {words[0]!r} is not installed on this host", hint="see what is missing: hvctl host doctor"
        ) from error
    except OSError as error:
        raise host_error(error) from error
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _communicate(
    process: subprocess.Popen[bytes],
    words: tuple[str, ...],
    stdin: bytes,
    timeout_s: float,
    on_line: Callable[[str], None] | None,
) -> Completed:
    try:
        if on_line is None:
            out, err = process.communicate(stdin, timeout=timeout_s)
        else:
            out, err = _communicate_by_line(process, on_line, timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TimedOut(
            f"{words[0]!r} did not end within {timeout_s:g} s: {shlex.join(words)}",
            hint="try again; if it hangs again, see `hvctl host doctor`",
        ) from error
    return Completed(argv=words, status=process.returncode, stdout=out, stderr=err.decode(errors="replace"))


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """As its own `wait`, which looks every 50 ms whether it has ended, but woken by its end. Raises TimeoutExpired."""
    if not ends_within(process.pid, timeout_s):
        raise subprocess.TimeoutExpired(process.args, timeout_s)
    process.wait()


def _communicate_by_line(
    process: subprocess.Popen[bytes], on_line: Callable[[str], None], timeout_s: float
) -> tuple[bytes, bytes]:
    """Like communicate without input, but hand out each line of stderr at once (from a thread of its own)."""
    assert process.stdin and process.stdout and process.stderr
    process.stdin.close()
    out: list[bytes] = []
    err: list[bytes] = []
    refusals: list[BaseException] = []

    def drain(stream: IO[bytes], into: list[bytes], tell: Callable[[str], None] | None) -> None:
        for line in stream:
            into.append(line)
            if tell is not None and not refusals:
                try:
                    tell(line.decode(errors="replace").rstrip("\n"))
                except BaseException as refusal:  # noqa: BLE001  raised where somebody sees it, below
                    refusals.append(refusal)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    threads = [
        threading.Thread(target=drain, args=(process.stdout, out, None), daemon=True),
        threading.Thread(target=drain, args=(process.stderr, err, on_line), daemon=True),
    ]
    for thread in threads:
        thread.start()
    _wait(process, timeout_s)
    for thread in threads:
        thread.join(timeout=5)
    if refusals:
        raise refusals[0]
    return b"".join(out), b"".join(err)


def _failure(done: Completed) -> CommandFailed:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = "; ".join(lines[-_STDERR_LINES_IN_MESSAGE:]) or "it said nothing"
    hint = "free some space: see `hvctl host doctor`" if "No space left" in done.stderr else ""
    return CommandFailed(
        f"{done.argv[0]!r} failed with status {done.status}: {last}", hint=hint, status=done.status, stderr=done.stderr
    )
