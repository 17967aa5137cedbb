"""One libvirt connection with a deadline on everything.

libvirt's calls have no time limit of their own. Opening is done in a thread that is left behind when it hangs; after
that, keepalive messages (answered by libvirtd's main loop) close a connection whose daemon is stopped or gone, and
every call then under way fails. They need an event loop that runs: one daemon thread, a second after the first
connection, or as soon as somebody waits for an event.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import libvirt

from hvctl.errors import HostError, TimedOut
from hvctl.libvirtapi.faults import from_libvirt, in_words

OPEN_TIMEOUT_S = 10
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3
_SOCKETS = ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock", "/run/libvirt/virtlxcd-sock")
_LOOP_DELAY_S = 1
"""Keepalive needs no loop before; what is shorter is spared a thread that wakes up, and takes the interpreter's lock, at
every message."""

_loop_started = threading.Lock()
_is_loop_running = False
_is_loop_wanted = threading.Event()


class Connection:
    """An open connection to one libvirt driver (`qemu:///system`, `lxc:///system`, `test:///default`)."""

    def __init__(self, uri: str, handle: libvirt.virConnect) -> None:
        self.uri = uri
        self.handle = handle

    @classmethod
    def open(cls, uri: str, *, read_only: bool = False) -> Connection:
        """Connect. Raises HostError when the driver does not answer, TimedOut after 10 s of silence."""
        start_event_loop()
        handle = _open_guarded(uri, read_only)
        if not uri.startswith("test:"):  # the in-process test driver has nobody to ask
            with in_words(f"cannot watch the connection to {uri}"):
                handle.setKeepAlive(_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT)
        return cls(uri, handle)

    @contextlib.contextmanager
    def watching(self, domain: libvirt.virDomain, events: dict[int, Callable[..., Any]]) -> Iterator[None]:
        """Have each event (`VIR_DOMAIN_EVENT_ID_*`) of the domain told without delay to its function, on the event thread."""
        expect_events()
        identifiers = []
        try:
            for event, tell in events.items():
                identifiers.append(self.handle.domainEventRegisterAny(domain, event, tell, None))
            yield
        finally:
            for identifier in identifiers:
                self.handle.domainEventDeregisterAny(identifier)

    def close(self) -> None:
        """Close; fine when it is lost already."""
        try:
            self.handle.close()
        except libvirt.libvirtError:
            return

    @property
    def is_alive(self) -> bool:
        try:
            return bool(self.handle.isAlive())
        except libvirt.libvirtError:
            return False

    def version(self) -> tuple[int, int, int]:
        """Version of the libvirt that answers."""
        with in_words(f"cannot ask {self.uri} for its version"):
            number = self.handle.getLibVersion()
        return number // 1_000_000, number // 1000 % 1000, number % 1000


def start_event_loop() -> None:
    """Run libvirt's event loop in a daemon thread, once a process; silence its habit of printing errors."""
    global _is_loop_running
    with _loop_started:
        if _is_loop_running:
            return
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_loop, name="libvirt-events", daemon=True).start()
        _is_loop_running = True


def expect_events() -> None:
    """Have libvirt's events told without delay, from now on."""
    _is_loop_wanted.set()


def _run_loop() -> None:
    _is_loop_wanted.wait(_LOOP_DELAY_S)
    while True:
        libvirt.virEventRunDefaultImpl()


def _open_guarded(uri: str, read_only: bool) -> libvirt.virConnect:
    results: list[libvirt.virConnect | libvirt.libvirtError] = []

    def attempt() -> None:
        try:
            results.append(libvirt.openReadOnly(uri) if read_only else libvirt.open(uri))
        except libvirt.libvirtError as error:
            results.append(error)

    thread = threading.Thread(target=attempt, name="libvirt-open", daemon=True)
    thread.start()
    thread.join(OPEN_TIMEOUT_S)
    if not results:
        raise TimedOut(
            f"libvirtd did not answer on {uri} within {OPEN_TIMEOUT_S} s", hint="see what hangs: hvctl host doctor"
        )
    result = results[0]
    if not isinstance(result, libvirt.libvirtError):
        return result
    error = from_libvirt(result, f"cannot reach libvirt at {uri}")
    if isinstance(error, HostError) and error.hint:
        raise error from result
    raise HostError(error.message, hint=_hint_unreached(uri)) from result


def _hint_unreached(uri: str) -> str:
    """What may help: where it is there, root is answered. Without polkit libvirt turns others away in words about a bus."""
    if os.geteuid() == 0:
        return "is it set up and running? hvctl host setup"
    if ":///" in uri and any(os.path.exists(path) for path in _SOCKETS):
        return "run it as root, or join the group 'libvirt' and log in again"
    return "is it set up and running? as root: hvctl host setup"
