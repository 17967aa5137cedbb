"""Layers of containers: directories that an overlay is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from hvctl import seed
from hvctl.backends.layers import Layers
from hvctl.errors import NotFound
from hvctl.host import Host
from hvctl.hostside import files, freezer, layers, quotas, roots
from hvctl.libvirtapi import domains
from hvctl.model import Image, Mode, Provision, Record, State
from hvctl.shell.base import Argument

if TYPE_CHECKING:
    from hvctl.hostside import differences
    from hvctl.hostside.transfer import Source
    from hvctl.rootfs.building import Building

_COPY_TIMEOUT_S = 3600
_TREE = "tree.tar"


class ContainerLayers(Layers):
    grows_while_running = False
    is_replaced_while_running = False

    def create(self, host: Host, record: Record, image: Image, layer: str, parent: str) -> None:
        host.shell.call(roots.make_layer, host.store.layer(layer), record.first_id or 0, parent)
        host.shell.call(layers.sync_new, host.store.layer(layer))

    def discard(self, host: Host, layer: str) -> None:
        """Its limit, too, or the file system would keep that for ever."""
        if host.shell.call(files.exists, host.store.layer_upper(layer)):
            host.shell.call(quotas.limit, host.store.layer(layer), 0)
        super().discard(host, layer)

    def seal(self, host: Host, layer: str) -> None:
        """Nothing: no container has its upper directory as anything but a read-only lower one from now on."""

    def is_untouched(self, host: Host, layer: str) -> bool:
        parent = host.shell.call(layers.read_facts, host.store.layer(layer)).parent
        below = host.store.layer_upper(parent) if parent else None
        return host.shell.call(layers.is_untouched_upper, host.store.layer_upper(layer), below)

    def measure_running(self, host: Host, record: Record) -> int:
        return host.shell.call(files.disk_usage, host.store.layer(record.layers[-1]))

    def find_freezer(self, host: Host, record: Record) -> str:
        return ""

    def freeze(self, host: Host, record: Record) -> None:
        pause(host, record)

    def thaw(self, host: Host, record: Record) -> None:
        with contextlib.suppress(NotFound):
            if domains.describe(_domain(host, record)).live.state is State.PAUSED:
                resume(host, record)

    def fill(self, host: Host, record: Record, layer: str) -> None:
        """By cp(1), which keeps whiteouts, hard links, holes and all attributes, and shares blocks where it can."""
        source, target = host.store.layer_upper(record.layers[-1]), host.store.layer_upper(layer)
        host.shell.call(files.remove, target / "sys")  # a new layer has it; that of the source may be something else
        words: list[Argument] = ["cp", "--archive", "--reflink=auto", "--", f"{source}/.", target]
        host.shell.run(words, timeout_s=_COPY_TIMEOUT_S)

    def restack(self, host: Host, record: Record, image: Image, xml: str) -> str:
        """The mount is the hook's; but one that was a VM meanwhile may have other ids than a definition of then."""
        domain = ElementTree.fromstring(xml)
        self.adapt_copy(domain, record)
        return ElementTree.tostring(domain, encoding="unicode")

    def adapt_copy(self, domain: ElementTree.Element, record: Record) -> None:
        for element in (*domain.iterfind("idmap/uid"), *domain.iterfind("idmap/gid")):
            if element.get("start") == "0":
                element.set("target", str(record.first_id or 0))

    def begin_copy(self, host: Host, record: Record, host_key: bytes) -> None:
        """An empty machine id: systemd takes its container's UUID for it then (machine-id(5))."""
        owner, top = record.first_id or 0, host.store.layer(record.layers[-1])
        below = [host.store.layer_upper(layer) for layer in reversed(record.layers[:-1])]
        below.append(host.store.image_tree(record.image_id))
        host.shell.call(roots.reset_machine_id, top, owner, below)
        if record.provision is Provision.NOCLOUD:
            content = seed.format_files(record, host_key, b"")
            host.shell.call(roots.add_files, top, owner, "var/lib/cloud/seed/nocloud", content)

    def merge(self, host: Host, image: Image, run: tuple[str, ...], parent: str, aside: Path) -> None:
        store, call = host.store, host.shell.call
        highest = call(layers.read_facts, store.layer(run[-1]))
        call(files.make_directory, aside, 0o700)
        below = [store.image_tree(image.id), *map(store.layer_upper, call(layers.list_stack, store.layers, parent))]
        call(layers.merge_uppers, [store.layer_upper(layer) for layer in run], below, aside / "upper")
        call(layers.write_facts, aside, layers.Facts(highest.first_id, parent))

    def list_base(self, host: Host, image: Image) -> tuple[Image, dict[str, Source]]:
        from hvctl.hostside import transfer

        tree = host.store.image_tree(image.id)
        bare = replace(image, disk=None, kernel=None, initrd=None, kernel_arguments=(), kernel_release="")
        source = transfer.Source(kind=transfer.TREE, path=str(tree), name=tree.name)
        return replace(bare, has_tree=True, tree_digest=""), {_TREE: source}

    def is_known_by(self, host: Host, image: Image) -> bool:
        """The tree that it came with; not one that was made of its disk."""
        return host.shell.call(files.exists, host.store.image(image.id) / "tree" / "rootfs")

    def has_base(self, host: Host, image: Image, base: Image) -> bool:
        return self.is_known_by(host, image)

    def read_layer(self, host: Host, layer: str) -> Source:
        from hvctl.hostside import transfer

        facts = host.shell.call(layers.read_facts, host.store.layer(layer))
        upper = host.store.layer_upper(layer)
        return transfer.Source(kind=transfer.TREE, path=str(upper), name=upper.name, first_id=facts.first_id)

    def write_base(self, work: Building, base: Image, parts: Mapping[str, Path]) -> None:
        from hvctl.rootfs import unpacked

        unpacked.unpack(work.host, parts[_TREE], work.image / "tree", "rootfs")

    def write_layer(self, host: Host, image: Image, parent: str, content: Path, aside: Path) -> None:
        """Its owners are as inside, like an image's: a mount shifts them."""
        from hvctl.rootfs import unpacked

        call = host.shell.call
        unpacked.unpack(host, content, aside, "upper")
        call(layers.write_facts, aside, layers.Facts(parent=parent))

    def list_differences(self, host: Host, record: Record, tops: tuple[str, str]) -> list[tuple[str, str]]:
        """What changed from one layer's stack to another's."""
        from hvctl.hostside import differences

        stacks = (self._trees_of(host, record, top) for top in tops)
        return host.shell.call(differences.list_differences, *stacks)

    def _trees_of(self, host: Host, record: Record, top: str) -> differences.Stack:
        from hvctl.hostside import differences

        store, call = host.store, host.shell.call
        stack = reversed(call(layers.list_stack, store.layers, top))
        trees = [
            differences.Tree(store.layer_upper(layer), call(layers.read_facts, store.layer(layer)).first_id)
            for layer in stack
        ]
        return (*trees, differences.Tree(store.image_tree(record.image_id), 0))


def pause(host: Host, record: Record) -> None:
    """Stop all that runs inside, where it is."""
    domain = _domain(host, record)
    if host.shell.call(freezer.has_own, domains.get_number(domain)):
        host.shell.call(freezer.freeze, domains.get_number(domain))
    else:
        domains.pause(domain)


def resume(host: Host, record: Record) -> None:
    """Let a paused one go on."""
    domain = _domain(host, record)
    if domains.is_running(domain):  # as far as libvirt knows
        host.shell.call(freezer.thaw, domains.get_number(domain))
    else:
        domains.resume(domain)


def _domain(host: Host, record: Record) -> Any:
    return domains.get(host.connection(Mode.CONTAINER), record.uuid)
