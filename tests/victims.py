"""Processes that do a verb and kill themselves with -9 when a step of it begins."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

from hvctl.config import Config
from hvctl.events import Event, Sink, StepStarted
from hvctl.host import Host

# A process that has hvctl imported and no connection open: each victim is forked from it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tests.test_crash", "tests.test_images_guest", "cryptography.hazmat.primitives.asymmetric.ed25519", "paramiko"]
)

Deed = Callable[[Host, str, Sink], object]


def die_at(settings: Config, deed: Deed, verb: str, step: str, name: str) -> None:
    """Let a process do `deed` on `name` and die at that step. Fails when it never comes there."""
    assert _run(_act, settings, deed, verb, step, name) == -signal.SIGKILL, f"{verb} never came to its step {step!r}"


def die_in(settings: Config, deed: Callable[[Host, str], object], name: str) -> None:
    """Let a process do a deed on `name` that kills it. Fails when it survives."""
    assert _run(_act_alone, settings, deed, name) == -signal.SIGKILL, "it survived"


def _run(act: Callable[..., None], *arguments: object) -> int | None:
    victim = _context.Process(target=act, args=arguments)
    victim.start()
    victim.join(timeout=120)
    return victim.exitcode


def _act_alone(settings: Config, deed: Callable[[Host, str], object], name: str) -> None:
    deed(Host(settings), name)


def _act(settings: Config, deed: Deed, verb: str, step: str, name: str) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, StepStarted) and (event.verb, event.step) == (verb, step):
            os.kill(os.getpid(), signal.SIGKILL)

    deed(Host(settings), name, kill)
