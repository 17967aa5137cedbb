"""`run`: an instance for one command. Made, started, its streams the caller's; deleted when the command has ended.

The instance is marked ephemeral in its record, and this process holds a lock as long as it lives: what a killed `run`
leaves is told by the free lock, and `gc` deletes it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hvctl import identity
from hvctl.access import terminal
from hvctl.backends import get_backend, processes
from hvctl.errors import (
    AlreadyExists,
    GuestFailed,
    HvctlError,
    InvalidSpec,
    NotFound,
    TimedOut,
    Unsupported,
    UsageError,
)
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.instances import claim, create, effects, enter, lifecycle, query
from hvctl.libvirtapi import domains
from hvctl.model import Image, Instance, Wait
from hvctl.rootfs import application, published
from hvctl.values import dataclass

_ASK_AGAIN_S = 1.0
_POLL_S = 0.02
_LAST_WORD_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be run: an instance, and the command where its image is a whole system."""

    create: create.Request
    command: tuple[str, ...] = ()
    with_terminal: bool | None = None
    """None: with one when there is a person and the mode can."""


def run(host: Host, request: Request, events: Sink = ignore, *, streams: Sequence[int] = (0, 1, 2)) -> int:
    """Run a command in an instance of its own; its exit code, 128 + N when signal N ended it.

    A first KeyboardInterrupt asks the command to end as its image wants to be asked, a second one kills it. Raises what
    `create` raises, and GuestFailed when the instance ended without a word on its command. Nothing is left behind.
    """
    host.require_root("run")
    spec, has_terminal = replace(request.create.spec, is_ephemeral=True), _wants_terminal(request)
    identity.check_name(spec.name)
    image = published.get_image(host, spec.image)
    if image.process is None and not request.command:
        raise UsageError(
            f"image {image.name!r} is a whole system, with no command of its own",
            hint=f"hvctl run {image.name} -- COMMAND; to keep it: hvctl create NAME --image {image.name}",
        )
    if image.process is None and request.create.wishes.are_any:
        raise InvalidSpec(
            f"image {image.name!r} is a whole system: --env, --entrypoint and --user are for applications",
            hint=f"say it in the command: hvctl run {image.name} -- env K=V COMMAND, or -- runuser -u USER -- COMMAND",
        )
    made = replace(request.create, spec=spec)
    with host.lock(claim.run_lock(spec.name)), contextlib.ExitStack() as stack:
        _check_free(host, spec.name)
        stack.callback(_delete, host, spec.name)
        if image.process is None:
            create.create(host, replace(made, wait=Wait.AGENT), events)
            return enter.attach(host, spec.name, request.command, with_terminal=has_terminal)
        if has_terminal:
            return _run_in_terminal(host, made, events)
        return _run_process(host, made, events, streams)


def is_application(image: Image) -> bool:
    """Whether an image is one process rather than a system."""
    return image.process is not None


def _run_process(host: Host, request: create.Request, events: Sink, streams: Sequence[int]) -> int:
    instance = create.create(host, replace(request, wait=Wait.RUNNING), events)
    watch = _Watch(host, instance, request.timeout_s)
    ends = get_backend(instance.record.mode).open_streams(host, instance.record)
    with contextlib.closing(ends):
        while True:
            try:
                ends.copy(streams, watch.look)
                return watch.wait_for_code()
            except KeyboardInterrupt:
                watch.stop()


def _run_in_terminal(host: Host, request: create.Request, events: Sink) -> int:
    """The instance's init waits; the process is started from here."""
    wishes = replace(request.wishes, terminal=terminal.name())
    instance = create.create(host, replace(request, wishes=wishes, wait=Wait.RUNNING), events)
    watch = _Watch(host, instance, request.timeout_s)
    while watch.look() and not watch.has_started:
        host.pause(_POLL_S)
    return enter.attach(host, instance.name, application.START, with_terminal=True)


def _wants_terminal(request: Request) -> bool:
    """Raises Unsupported where one is asked for and the mode has none."""
    backend = get_backend(request.create.spec.mode)
    is_person = terminal.is_interactive() and sys.stderr.isatty()
    if request.with_terminal is False or (request.with_terminal is None and not is_person):
        return False
    try:
        backend.check_terminal()
    except Unsupported:
        if request.with_terminal:
            raise
        return False
    return True


def _check_free(host: Host, name: str) -> None:
    """What stands under the name must not be taken for ours in the end. Raises AlreadyExists."""
    if query.find(host, name) is not None:
        raise AlreadyExists(f"there is already an instance {name!r}", hint="choose another name with --name")


class _Watch:
    """Follows one application to its end."""

    def __init__(self, host: Host, instance: Instance, timeout_s: float) -> None:
        self.host = host
        self.instance = instance
        self._domain: Any = effects.get_domain(host, instance.record)
        self._asked_s = 0.0
        self._late_s = time.monotonic() + timeout_s
        self.has_started = False

    def look(self) -> bool:
        """Whether it still runs; asks it again to end where it was asked once and may have been too young to hear.

        Raises TimedOut when its process has not begun in time.
        """
        if not self.has_started:
            self.has_started = processes.read_status(self.host, self.instance.record).has_started
            if not self.has_started and time.monotonic() > self._late_s:
                raise TimedOut(
                    f"the process of {self.instance.name!r} did not begin in time",
                    hint="try again; to look into it: hvctl create, then hvctl logs",
                )
        if self._asked_s and time.monotonic() - self._asked_s > _ASK_AGAIN_S:
            self._ask()
        return domains.is_active(self._domain)

    def stop(self) -> None:
        """Ask it to end; kill it the second time."""
        if self._asked_s:
            effects.kill(self.host, self.instance.record)
        self._ask()

    def wait_for_code(self) -> int:
        """The exit code that its init has noted. Raises GuestFailed when it has ended without."""
        deadline_s = time.monotonic() + _LAST_WORD_S
        while True:
            is_running = self.look() and time.monotonic() < deadline_s
            code = processes.read_status(self.host, self.instance.record).exit_code
            if code is not None:
                return code
            if not is_running:
                raise GuestFailed(
                    f"{self.instance.name!r} ended without a word on its command",
                    hint="was it killed, or out of memory? try --memory",
                )
            self.host.pause(_POLL_S)

    def _ask(self) -> None:
        self._asked_s = time.monotonic()
        with contextlib.suppress(HvctlError):  # it may have ended this moment
            get_backend(self.instance.record.mode).ask_to_stop(self.host, self.instance.record)


def _delete(host: Host, name: str) -> None:
    """Delete what we made, and nothing else that has this name by now."""
    instance = query.find(host, name)
    if instance is not None and instance.record.spec.is_ephemeral:
        with contextlib.suppress(NotFound):
            lifecycle.delete(host, name)
