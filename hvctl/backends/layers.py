"""What a mode does with the layers of its roots: making, sealing, stacking, holding still, merging.

One interface, one module a mode (`vmlayers`, `containerlayers`); snapshots, copies and compaction are written once, on
top of it (`instances/snapshots.py`, `copies.py`, `compact.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from hvctl.host import Host
from hvctl.hostside import files, layers
from hvctl.model import Image, Record

if TYPE_CHECKING:
    from hvctl.hostside.transfer import Source
    from hvctl.rootfs.building import Building


class Layers(ABC):
    """The layers of one mode. Holds no state; every effect may be done twice."""

    grows_while_running: bool
    """Whether a snapshot of a running instance puts a new layer on its stack, or copies the writable one aside."""
    is_replaced_while_running: bool
    """Whether a running instance keeps what it has open of a layer that is replaced or removed."""

    @abstractmethod
    def create(self, host: Host, record: Record, image: Image, layer: str, parent: str) -> None:
        """Make an empty layer on another ("": on the image) for an instance."""

    @abstractmethod
    def seal(self, host: Host, layer: str) -> None:
        """Take away what could still write to a layer that is no top any more."""

    @abstractmethod
    def is_untouched(self, host: Host, layer: str) -> bool:
        """Whether nothing was ever written to it."""

    def restack(self, host: Host, record: Record, image: Image, xml: str) -> str:
        """A definition whose root stands on the layers of the record."""
        return xml

    def is_on(self, host: Host, record: Record, layer: str) -> bool:
        """Whether libvirt, whatever the record says, has this layer as the instance's top."""
        return record.layers[-1] == layer

    def measure_depth(self, host: Host, record: Record) -> int:
        """How many layers it stands on; a running one may still stand on more than its record says."""
        return len(record.layers)

    def measure_running(self, host: Host, record: Record) -> int:
        """Bytes that a snapshot of the running instance takes at once, its memory left out."""
        return 0

    def list_left_out(self, host: Host, record: Record) -> list[str]:
        """What it writes to beside its root, by the name that its definition has for it."""
        return []

    @abstractmethod
    def find_freezer(self, host: Host, record: Record) -> str:
        """Why the running instance cannot be held still with everything written; empty when it can."""

    @abstractmethod
    def freeze(self, host: Host, record: Record) -> None:
        """Hold the running instance still. Raises HvctlError; `thaw` is then still to be called."""

    @abstractmethod
    def thaw(self, host: Host, record: Record) -> None:
        """Let it go on; fine when it does, or is off. Raises HvctlError when it cannot be told to."""

    def fill(self, host: Host, record: Record, layer: str) -> None:
        """Copy the top of the running instance into a layer aside."""
        return

    def switch(self, host: Host, record: Record, layer: str, memory: Path | None) -> None:
        """Let the running instance write to this layer from now on, and keep its memory in a file where one is named."""
        return

    def keep_state(self, host: Host, record: Record, image: Image, folder: Path) -> None:
        """Copy what belongs to its state beside its root (NVRAM, TPM, a kernel of its own) into a directory."""
        return

    def take_state(self, host: Host, was: Record | None, record: Record, image: Image, folder: Path) -> None:
        """Put what a snapshot kept beside what is in use, for a record that was another before (None: nothing)."""
        return

    def swap_state(self, host: Host, record: Record) -> None:
        """Give what `take_state` put aside its names; fine when it has them."""
        return

    def discard_state(self, host: Host, record: Record) -> None:
        """Remove what `take_state` put aside."""
        return

    def adapt_copy(self, domain: ElementTree.Element, record: Record) -> None:
        """Give a definition that is a copy what only this mode has of an identity."""
        return

    def begin_copy(self, host: Host, record: Record, host_key: bytes) -> None:
        """Put into the new top of a copy what makes it another machine at its first boot."""
        return

    def discard(self, host: Host, layer: str) -> None:
        """Remove a layer."""
        host.shell.call(files.remove, host.store.layer(layer))

    @abstractmethod
    def merge(self, host: Host, image: Image, run: tuple[str, ...], parent: str, aside: Path) -> None:
        """Make one layer, in a directory aside, that shows on `parent` what `run` (lowest first) shows on what it stands on."""

    @abstractmethod
    def list_base(self, host: Host, image: Image) -> tuple[Image, dict[str, Source]]:
        """What of an image a root of this mode stands on: a description of just that, and how its parts are read, by
        their names. A tree is known by its archive: whoever has that completes the description (`tree_digest`)."""

    @abstractmethod
    def is_known_by(self, host: Host, image: Image) -> bool:
        """Whether the identifier of an image stands for the base that it has here, too, and so for the same elsewhere."""

    @abstractmethod
    def has_base(self, host: Host, image: Image, base: Image) -> bool:
        """Whether an image of the store, known by the right identifier, has a base that was described elsewhere."""

    @abstractmethod
    def read_layer(self, host: Host, layer: str) -> Source:
        """How a sealed layer is read for a backup."""

    @abstractmethod
    def write_base(self, work: Building, base: Image, parts: Mapping[str, Path]) -> None:
        """Put the parts of a base, which came from outside, into the directory of an image in the making.

        Raises InvalidSpec for what is refused.
        """

    @abstractmethod
    def write_layer(self, host: Host, image: Image, parent: str, content: Path, aside: Path) -> None:
        """Make a sealed layer on another ("": on the image) in a directory aside, from content that came from outside.

        The file is used up. Raises InvalidSpec for what is refused.
        """

    def group(self, host: Host, run: tuple[str, ...]) -> list[tuple[str, ...]]:
        """A run of layers as the runs that can be merged: only what was written with the same owners."""
        groups: list[tuple[str, ...]] = []
        last = None
        for layer in run:
            first_id = host.shell.call(layers.read_facts, host.store.layer(layer)).first_id
            if groups and first_id == last:
                groups[-1] = (*groups[-1], layer)
            else:
                groups.append((layer,))
            last = first_id
        return groups
