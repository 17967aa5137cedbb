"""The interface of a mode's data disks: what each can take, how its definition names one, how a running one gets it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import field
from typing import ClassVar
from xml.etree.ElementTree import Element

from hvctl.host import Host
from hvctl.model import Cache, DataDisk, Record, Throttle, VolumeFormat
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class DiskRequest:
    """What `disk add` is asked for. At most one of `existing`, `device` and `iso` is given; none: a new volume."""

    name: str
    size_bytes: int = 0
    format: VolumeFormat | None = None
    filesystem: str = ""
    existing: DataDisk | None = None
    """A volume that nobody has now."""
    device: str = ""
    iso: str = ""
    target: str = ""
    serial: str = ""
    is_read_only: bool = False
    is_trusted: bool = False
    """Whether the host's kernel may read a file system that a guest has written."""
    cache: Cache = Cache.DEFAULT
    has_discard: bool = True
    throttle: Throttle = field(default_factory=Throttle)


class Disks(ABC):
    """The disks of one mode. Holds no state; every effect may be done twice."""

    grows_file_systems: ClassVar[bool]
    """Whether `grow` makes the file system on a data disk larger, too."""
    shrinks_roots: ClassVar[bool] = False
    """Whether the root can be made smaller, too: its size is a limit, and nothing lies beyond an end."""

    @abstractmethod
    def plan(self, host: Host, record: Record, request: DiskRequest) -> DataDisk:
        """The disk that is asked for, everything chosen; a new volume's identifier is still empty. Changes nothing.

        Raises Unsupported, InvalidSpec, WrongState or HostError for what cannot be.
        """

    @abstractmethod
    def plan_again(self, record: Record, disk: DataDisk, *, is_trusted: bool) -> DataDisk:
        """A volume's disk as a backup describes it, for the record of an instance that is to have it again.

        `is_trusted`: whether this host's kernel may read its file system. Raises InvalidSpec, Unsupported.
        """

    @abstractmethod
    def add_to(self, host: Host, record: Record, domain: Element, disk: DataDisk) -> None:
        """Put the disk into a definition; everything else in it stays."""

    @abstractmethod
    def remove_from(self, host: Host, record: Record, domain: Element, disk: DataDisk) -> None:
        """Take the disk out of a definition; fine when it is not there."""

    @abstractmethod
    def attach(self, host: Host, record: Record, disk: DataDisk) -> bool:
        """Give the running instance the disk; False where that must wait for the next start. Fine when it has it."""

    @abstractmethod
    def check_unused(self, host: Host, record: Record, disk: DataDisk, *, force: bool) -> None:
        """Raise WrongState while somebody would lose data if the disk went; `force`: not for what only the guest says."""

    @abstractmethod
    def detach(self, host: Host, record: Record, disk: DataDisk) -> None:
        """Take the disk away from the running instance; fine when it does not have it.

        Raises WrongState where that needs a stopped one, TimedOut or GuestFailed when the guest does not let go.
        """

    @abstractmethod
    def get_root_size(self, host: Host, record: Record) -> int:
        """Bytes of the root; 0 where it has no size of its own, or this user may not look."""

    @abstractmethod
    def describe_root(self, host: Host, record: Record) -> DataDisk:
        """The root in the words of a data disk."""

    @abstractmethod
    def check_growth(self, host: Host, record: Record, disk: DataDisk | None, size_bytes: int, is_off: bool) -> None:
        """Raise what forbids to give the disk (None: the root) this size. Changes nothing."""

    @abstractmethod
    def grow(self, host: Host, record: Record, disk: DataDisk | None, size_bytes: int) -> None:
        """Give the disk (None: the root) this size, running or not; fine when it has it."""

    @abstractmethod
    def grow_inside(self, host: Host, record: Record, size_bytes: int) -> bool:
        """Let the running instance use all of its root; False where it must do that itself."""

    @abstractmethod
    def throttle_in(self, host: Host, record: Record, domain: Element, disk: DataDisk | None, limits: Throttle) -> None:
        """Limit a disk (None: the root) in a definition. Raises Unsupported."""

    @abstractmethod
    def throttle(self, host: Host, record: Record, disk: DataDisk | None, limits: Throttle) -> None:
        """Limit a disk (None: the root) of the running instance."""
