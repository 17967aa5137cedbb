"""Processes that do a verb and are killed on the way, or whose system calls fail: forked from one that has all imported."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from hvctl.config import Config
from hvctl.errors import HvctlError
from hvctl.events import Event, Sink, StepStarted, ignore
from hvctl.host import Host
from hvctl.model import Mode

# A process that has hvctl imported and no connection open: each victim is forked from it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.scenarios", "tests.test_images_guest", "paramiko"])

Deed = Callable[[Host, str, Sink], object]
_TIMEOUT_S = 120
REFUSED = 3
"""The exit code of a victim that ended with an error of hvctl's own."""


def die_at(settings: Config, deed: Deed, verb: str, step: str, name: str) -> None:
    """Let a process do `deed` on `name` and die at that step. Fails when it never comes there."""
    assert _run(_act, settings, deed, verb, step, name) == -signal.SIGKILL, f"{verb} never came to its step {step!r}"


def die_in(settings: Config, deed: Callable[[Host, str], object], name: str) -> None:
    """Let a process do a deed on `name` that kills it. Fails when it survives."""
    assert _run(_act_alone, settings, deed, name) == -signal.SIGKILL, "it survived"


@dataclass(frozen=True)
class Traced:
    """How a victim ended whose system calls strace had in hand."""

    code: int | None
    """0, REFUSED, -9, or that of a traceback (1)."""
    was_hit: bool
    """Whether the fault came: it does not when there are fewer such calls."""
    calls: str
    """What strace saw."""


def fail_calls(settings: Config, deed: Deed, name: str, calls: str, fault: str) -> Traced:
    """Let a process do a deed while strace(1) does `fault` to one of these system calls of it, or of what it starts."""
    ours, theirs = _context.Pipe()
    victim = _context.Process(target=_act_when_told, args=(theirs, settings, deed, name))
    victim.start()
    theirs.close()
    with contextlib.ExitStack() as undo:
        undo.callback(victim.kill)
        assert ours.poll(_TIMEOUT_S) and ours.recv() == "ready" and victim.pid is not None
        log = undo.enter_context(tempfile.NamedTemporaryFile("r"))
        words = ["strace", "-f", "-qq", "-o", log.name, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"]
        strace = undo.enter_context(subprocess.Popen([*words, "-p", str(victim.pid)], stderr=subprocess.PIPE))
        undo.callback(strace.kill)
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not _is_traced(victim.pid):
            assert strace.poll() is None, strace.stderr.read() if strace.stderr else ""
            assert time.monotonic() < deadline_s, "strace does not come"
        ours.send("go")
        victim.join(timeout=_TIMEOUT_S)
        strace.wait(timeout=_TIMEOUT_S)  # it ends with the last process that the victim has started
        code, text = victim.exitcode, log.read()
    return Traced(code, "(INJECTED)" in text or "killed by SIGKILL" in text, text)


def _is_traced(process: int) -> bool:
    """Whether all of its threads are."""
    tasks = Path(f"/proc/{process}/task").glob("*/status")
    return all("\nTracerPid:\t0\n" not in task.read_text() for task in tasks)


def _run(act: Callable[..., None], *arguments: object) -> int | None:
    victim = _context.Process(target=act, args=arguments)
    victim.start()
    victim.join(timeout=_TIMEOUT_S)
    code = victim.exitcode
    victim.kill()
    return code


def _act_alone(settings: Config, deed: Callable[[Host, str], object], name: str) -> None:
    deed(Host(settings), name)


def _act(settings: Config, deed: Deed, verb: str, step: str, name: str) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, StepStarted) and (event.verb, event.step) == (verb, step):
            os.kill(os.getpid(), signal.SIGKILL)

    deed(Host(settings), name, kill)


def _act_when_told(parent: Connection, settings: Config, deed: Deed, name: str) -> None:
    host = Host(settings)
    for mode in Mode:
        host.connection(mode)
    parent.send("ready")
    parent.recv()
    try:
        deed(host, name, ignore)
    except HvctlError:
        os._exit(REFUSED)
    os._exit(0)  # the connections need no farewell: its system calls are not what is looked at
