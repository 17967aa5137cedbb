"""What a mode does when an instance comes to it from the other one, or leaves it.

One interface, one module a mode (`vmconversion`, `containerconversion`); the verb is written once (`instances/convert.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import field

from hvctl.host import Host
from hvctl.model import Image, Record, Spec
from hvctl.rootfs.building import Building
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A root that was taken over from the other mode."""

    record: Record
    """With what the root has decided: the size of its disk, its kernel."""
    image: Image
    """What a definition is rendered from: with the kernel's arguments."""
    user_data: bytes = field(default=b"", repr=False)
    """cloud-init's, as the guest has it; empty where it has none."""
    left_behind: str = ""
    """What of its disk is not taken over, for people: other file systems than the root."""


class Conversion(ABC):
    """The way into a mode and out of it. Holds no state; every effect may be done twice."""

    @abstractmethod
    def list_losses(self, host: Host, record: Record) -> list[str]:
        """What of an instance the other mode cannot have, each a clause for people."""

    @abstractmethod
    def adopt(self, spec: Spec) -> Spec:
        """What was asked of an instance of the other mode, as far as it makes sense in this one."""

    @abstractmethod
    def measure(self, host: Host, record: Record, image: Image) -> int:
        """Bytes that `take_root` needs at most, for a record of the other mode."""

    @abstractmethod
    def take_root(self, work: Building, source: Record, record: Record, image: Image) -> Taken:
        """Make the lowest layer of `record`, which shows what the root of `source`, of the other mode, shows.

        Raises InvalidSpec or Unsupported for a root that this mode cannot have, HostError without space.
        """

    @abstractmethod
    def shed(self, host: Host, record: Record) -> None:
        """Remove from its directory of the store what only this mode has there."""


def instance_data(record: Record) -> str:
    """Where cloud-init keeps the user data of this instance, inside."""
    return f"var/lib/cloud/instances/{record.uuid}/user-data.txt"


USER_DATA_LIMIT_BYTES = 16 * 1024**2
