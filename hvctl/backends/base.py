"""The interface of a mode: making and removing a root, the values of its template, running a command inside.

Everything else (define, start, metadata, console, ...) libvirt makes alike; it is in `libvirtapi` once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from hvctl.access.agent import ExecResult
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image, Mode, Record, Spec

Values = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What an instance gets that must never stand in its record, on a command line or in a log."""

    host_key: bytes = field(repr=False)
    """Private ssh host key, OpenSSH format."""
    user_data: bytes = field(default=b"", repr=False)
    """cloud-init user data; empty for none."""


class Backend(ABC):
    """One mode. Holds no state; every effect may be done twice."""

    mode: ClassVar[Mode]

    @abstractmethod
    def format_stub(self, record: Record) -> str:
        """The smallest domain XML that claims the name: nothing in it can run or be mistaken for the instance."""

    @abstractmethod
    def check(self, host: Host, record: Record, image: Image) -> None:
        """Raise InvalidSpec, Unsupported or HostError when this cannot become an instance; changes nothing."""

    @abstractmethod
    def check_size(self, spec: Spec) -> None:
        """Raise InvalidSpec or HostError for CPUs or memory that this host or mode cannot give."""

    @abstractmethod
    def create_files(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        """Write what belongs to it beside the root, in its directory of the store: identity, seed, kernel."""

    def discard_files(self, host: Host, record: Record) -> None:
        """Remove its directory of the store."""
        host.shell.call(files.remove, host.store.instance(record.uuid))

    @abstractmethod
    def create_root(self, host: Host, record: Record, image: Image) -> None:
        """Make the writable layer on the image."""

    def discard_root(self, host: Host, record: Record) -> None:
        """Remove its layers."""
        for layer in record.layers:
            host.shell.call(files.remove, host.store.layer(layer))

    @abstractmethod
    def format_values(self, host: Host, record: Record, image: Image) -> Values:
        """What its templates may use, by name."""

    @abstractmethod
    def finish_xml(self, host: Host, record: Record, image: Image, xml: str) -> str:
        """Add to a rendered definition what no template can be trusted to hold."""

    @abstractmethod
    def rename(self, host: Host, record: Record, name: str) -> None:
        """Give the stopped domain another name, its record and everything else kept; never a moment without either."""

    @abstractmethod
    def write_name(self, host: Host, record: Record) -> None:
        """Tell the instance its name as of the next start."""

    @abstractmethod
    def run_inside(self, host: Host, record: Record, argv: tuple[str, ...], stdin: bytes) -> ExecResult:
        """Run a command as root inside, without the network; output complete, the command's own exit status."""
