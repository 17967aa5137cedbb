"""One machine: its shell, its store and its connections to both libvirt drivers."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from hvctl import config, metadata
from hvctl.errors import HostError, HvctlError, Interrupted, WrongState
from hvctl.hostside import files, locks
from hvctl.model import Instance, Live, Mode, State
from hvctl.shell import LocalShell, Shell
from hvctl.store import Store

if TYPE_CHECKING:
    from hvctl.libvirtapi.connection import Connection


class Host:
    """The machine that a verb works on. Opens what it needs when it is first needed; a context manager."""

    def __init__(self, settings: config.Config | None = None, shell: Shell | None = None) -> None:
        self.config = settings or config.load()
        self.shell = shell or LocalShell()
        self.store = Store(root=self.config.store, run=self.config.run)
        self.cancelled = threading.Event()
        """Set to make every verb that works on this host stop at its next step or pause, and undo."""
        self._connections: dict[str, Connection] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._connections.values()):  # `connect_ahead` may still be at it
            connection.close()
        self._connections.clear()

    def connection(self, mode: Mode) -> Connection:
        """The connection to the driver of a mode, a fresh one where the last was lost. Raises HostError, TimedOut."""
        uri = getattr(self.config, f"{mode.value}_uri")
        with self._opening:
            known = self._connections.get(uri)
            if known is None or not known.is_alive:
                from hvctl.libvirtapi.connection import Connection  # here, so that `--help` needs no libvirt

                self._connections[uri] = Connection.open(uri)
            return self._connections[uri]

    def connect_ahead(self) -> None:
        """Begin to connect to both drivers beside what comes next: 10 ms less to wait. What fails, `connection` tells."""

        def connect() -> None:
            with contextlib.suppress(HvctlError):
                for mode in Mode:
                    self.connection(mode)

        threading.Thread(target=connect, name="connect-ahead", daemon=True).start()

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than until somebody cancels. Raises Interrupted then."""
        if self.cancelled.wait(seconds):
            raise Interrupted("interrupted")

    def instances(self) -> list[Instance]:
        """Every instance of this store on both drivers, by name, from libvirt alone.

        Raises HostError unless both drivers answered: half a list must never be taken for the whole.
        """
        from hvctl.libvirtapi import domains

        found: dict[UUID, Instance] = {}
        for mode in Mode:
            for listed in domains.list_all(self.connection(mode)):
                record = metadata.find(listed.xml)
                if record is None or record.store != self.store.root:
                    continue
                # While one changes its mode both drivers have it, and the one that it comes from has the intent.
                if record.uuid not in found or record.pending is not None:
                    found[record.uuid] = Instance(record=record, live=listed.live)
        for instance in self.list_renaming():
            found.setdefault(instance.record.uuid, instance)
        return sorted(found.values(), key=lambda instance: instance.name)

    def list_renaming(self) -> list[Instance]:
        """Instances whose definition the store keeps while libvirt has it under neither name; a crash leaves one so."""
        found = []
        folder = self.store.root / "renaming"
        try:
            names = files.list_names(folder)
        except PermissionError:  # the store is root's
            return []
        for name in names:
            record = metadata.find(self.read_text(folder / name))
            if record is not None:
                live = Live(
                    state=State.STOPPED,
                    cpus=record.spec.cpus,
                    memory_bytes=record.spec.memory_bytes,
                    is_autostart=record.spec.autostart,
                )
                found.append(Instance(record=record, live=live))
        return found

    @contextlib.contextmanager
    def lock(self, name: str, *, timeout_s: float = 0) -> Iterator[None]:
        """Hold the lock of a name (an instance's, `network-...`) for the block.

        Raises WrongState when another process holds it, HostError when locks cannot be made here.
        """
        path = self.store.locks / name
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.hold(path, timeout_s=timeout_s))
            except BlockingIOError as error:
                raise WrongState(
                    f"{name!r} is busy: another hvctl is working on it",
                    hint=f"wait for it, or see who: fuser -v {path}",
                ) from error
            except FileNotFoundError as error:
                raise HostError("this host is not set up for hvctl", hint="run as root: hvctl host setup") from error
            except PermissionError as error:
                raise HostError(
                    f"no permission to lock {name!r} in {path.parent}",
                    hint="run it as root, or join the group 'libvirt' and log in again",
                ) from error
            yield

    def is_busy(self, name: str) -> bool:
        """Whether somebody holds the lock of this name."""
        return not self.shell.call(locks.is_free, self.store.locks / name)

    def holds(self, name: str) -> bool:
        """Whether it is this thread of ours that holds the lock of this name."""
        return self.shell.call(locks.is_mine, self.store.locks / name)

    def require_root(self, action: str) -> None:
        """Raise HostError before anything is begun when the store cannot be written by this user."""
        if os.geteuid() != 0:
            raise HostError(
                f"{action} needs root: it changes the store {str(self.store.root)!r}", hint="try: sudo hvctl ..."
            )
        if not files.exists(self.store.instances):
            raise HostError("this host is not set up for hvctl", hint="hvctl host setup")

    def read_text(self, path: Path) -> str:
        """A small text file on the host."""
        return self.shell.call(files.read_file, path).decode()
