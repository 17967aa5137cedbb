"""A domain's serial console as two directions of bytes, over libvirt's stream and its event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import libvirt

from hvctl.libvirtapi.connection import Connection, expect_events
from hvctl.libvirtapi.faults import in_words

_CHUNK_BYTES = 4096
_READ = libvirt.VIR_STREAM_EVENT_READABLE | libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP


class Console:
    """An open console; a context manager. `receive` is called on libvirt's event thread with each chunk."""

    def __init__(
        self, connection: Connection, domain: libvirt.virDomain, receive: Callable[[bytes], None], *, force: bool
    ) -> None:
        """Attach. Raises WrongState or LibvirtFailed when another session has it; `force` ends that one."""
        self.ended = threading.Event()
        """Set when the other side is gone: the guest is off, or somebody took the console over."""
        self._receive = receive
        expect_events()
        with in_words(f"cannot attach to the console of {domain.name()!r}"):
            self._stream = connection.handle.newStream(libvirt.VIR_STREAM_NONBLOCK)
            domain.openConsole(None, self._stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE if force else 0)
            self._stream.eventAddCallback(_READ, self._on_event, None)

    def send(self, data: bytes) -> None:
        """Type this; waits while the guest does not read."""
        while data and not self.ended.is_set():
            with in_words("cannot write to the console"):
                count = self._stream.send(data)
            if count == -2:  # would block: its buffer is full
                self.ended.wait(0.02)
            else:
                data = data[count:]

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            self._stream.eventRemoveCallback()
            self._stream.abort()
        except libvirt.libvirtError:  # it had ended already
            return

    def _on_event(self, _stream: object, events: int, _opaque: object) -> None:
        if events & libvirt.VIR_STREAM_EVENT_READABLE:
            try:
                data = self._stream.recv(_CHUNK_BYTES)
            except libvirt.libvirtError:
                self.ended.set()
                return
            if isinstance(data, bytes) and data:
                self._receive(data)
                return
            if data == b"":
                self.ended.set()
        if events & (libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP):
            self.ended.set()
