"""Layers of virtual machines: qcow2 overlays, and what a VM's state is beside them (NVRAM, TPM, kernel)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from hvctl.access import agent
from hvctl.backends.layers import Layers
from hvctl.errors import HvctlError, InvalidSpec, NotFound, TimedOut
from hvctl.host import Host
from hvctl.hostside import files, layers, tpm
from hvctl.libvirtapi import domains, livedisks, survey
from hvctl.model import Image, Mode, Record
from hvctl.shell.base import Argument
from hvctl.units import GIB

if TYPE_CHECKING:
    from hvctl.hostside.transfer import Source
    from hvctl.rootfs.building import Building

log = logging.getLogger(__name__)

_QEMU_IMG_TIMEOUT_S = 60
_MERGE_TIMEOUT_S = 3600
_PING_TIMEOUT_S = 5
_FREEZE_TIMEOUT_S = 15
_THAW_TRIES = 3


class VmLayers(Layers):
    grows_while_running = True
    is_replaced_while_running = True

    def create(self, host: Host, record: Record, image: Image, layer: str, parent: str) -> None:
        """The backing file is named and not opened (`-u`): with a hundred of them that takes time."""
        assert image.disk is not None
        store, call = host.store, host.shell.call
        call(files.make_directory, store.layer(layer), 0o711)
        size_bytes = record.spec.disk_bytes or image.disk.virtual_bytes
        base, format_ = base_of(host, image) if not parent else (store.layer_disk(parent), "qcow2")
        disk = store.layer_disk(layer)
        words: list[Argument] = [
            "qemu-img",
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-F",
            format_,
            "-b",
            base,
            "--",
            disk,
            str(size_bytes),
        ]
        host.shell.run(words, timeout_s=_QEMU_IMG_TIMEOUT_S)
        call(files.set_mode, disk, 0o600)
        call(layers.write_facts, store.layer(layer), layers.Facts(parent=parent))
        call(layers.sync_new, store.layer(layer))

    def seal(self, host: Host, layer: str) -> None:
        host.shell.call(layers.seal, host.store.layer_disk(layer), find_reader(host))

    def is_untouched(self, host: Host, layer: str) -> bool:
        return host.shell.call(layers.is_untouched_disk, host.store.layer_disk(layer))

    def restack(self, host: Host, record: Record, image: Image, xml: str) -> str:
        domain = ElementTree.fromstring(xml)
        disk = find_root(host, domain)
        if disk is not None:
            source = disk.find("source")
            assert source is not None
            source.set("file", str(host.store.layer_disk(record.layers[-1])))
            add_backing(disk, chain_of(host, record, image))
        ElementTree.indent(domain)
        return ElementTree.tostring(domain, encoding="unicode") + "\n"

    def is_on(self, host: Host, record: Record, layer: str) -> bool:
        try:
            domain = _domain(host, record)
        except NotFound:
            return False
        wanted = str(host.store.layer_disk(layer))
        for is_inactive in (True, False):
            disk = find_root(host, ElementTree.fromstring(domains.get_xml(domain, inactive=is_inactive)))
            source = disk.find("source") if disk is not None else None
            if source is not None and source.get("file") == wanted:
                return True
        return False

    def measure_depth(self, host: Host, record: Record) -> int:
        live = domains.get_xml(_domain(host, record), inactive=False)
        return max(len(record.layers), live.count("<backingStore type="))

    def list_left_out(self, host: Host, record: Record) -> list[str]:
        domain = ElementTree.fromstring(domains.get_xml(_domain(host, record), inactive=False))
        root = find_root(host, domain)
        others = [
            disk for disk in domain.iterfind("devices/disk") if disk is not root and disk.find("readonly") is None
        ]
        return [target.get("dev", "") for disk in others for target in disk.findall("target")]

    def find_freezer(self, host: Host, record: Record) -> str:
        domain = _domain(host, record)
        if not domains.is_running(domain):
            return "it is paused"
        try:
            agent.ping(domain, timeout_s=_PING_TIMEOUT_S)
        except HvctlError as error:
            return error.message
        return ""

    def freeze(self, host: Host, record: Record) -> None:
        agent.freeze(_domain(host, record), timeout_s=_FREEZE_TIMEOUT_S)

    def thaw(self, host: Host, record: Record) -> None:
        """Until its agent says that nothing is frozen: a freeze that it has not heard yet waits for it in the channel."""
        try:
            domain = _domain(host, record)
        except NotFound:
            return
        if not domains.is_active(domain):
            return
        for attempt in range(_THAW_TRIES):
            try:
                if agent.thaw(domain, timeout_s=_FREEZE_TIMEOUT_S):
                    return
            except HvctlError as error:
                log.debug("thaw of %s: %s", record.name, error.message)
            time.sleep(0.1 * attempt)  # not host.pause: nobody may cancel this
        raise TimedOut(
            f"the file systems of {record.name!r} may be frozen, and its guest agent does not answer",
            hint=f"once it does, or after hvctl stop --force {record.name}: hvctl gc",
        )

    def switch(self, host: Host, record: Record, layer: str, memory: Path | None) -> None:
        domain = _domain(host, record)
        xml = domains.get_xml(domain, inactive=False)
        livedisks.switch(domain, xml, host.store.layers, host.store.layer_disk(layer), memory)

    def keep_state(self, host: Host, record: Record, image: Image, folder: Path) -> None:
        store, call = host.store, host.shell.call
        if call(files.exists, store.nvram(record.uuid)):
            call(files.clone_file, store.nvram(record.uuid), folder / "nvram.fd", 0o600)
        if has_tpm(host, record):
            call(tpm.keep, str(record.uuid), folder)
        if record.kernel_release != image.kernel_release:  # else the image has it
            for path in (store.kernel(record.uuid), store.initrd(record.uuid)):
                call(files.link_or_clone, path, folder / path.name, store.snapshots(record.uuid))

    def take_state(self, host: Host, was: Record | None, record: Record, image: Image, folder: Path) -> None:
        store, call, uuid = host.store, host.shell.call, record.uuid
        wanted = [(folder / "nvram.fd", store.nvram(uuid), 0o600)]
        if record.kernel_release and (was is None or was.kernel_release != record.kernel_release):
            sources: tuple[Path, ...] = (folder / "vmlinuz", folder / "initrd")
            if record.kernel_release == image.kernel_release and image.kernel and image.initrd:
                sources = tuple(store.image(image.id) / item.file for item in (image.kernel, image.initrd))
            wanted += [(sources[0], store.kernel(uuid), 0o444), (sources[1], store.initrd(uuid), 0o444)]
        for source, target, mode in wanted:
            call(files.remove, _aside(target))
            if call(files.exists, source):
                call(files.clone_file, source, _aside(target), mode)
        call(tpm.take, str(uuid), folder)

    def swap_state(self, host: Host, record: Record) -> None:
        store, call, uuid = host.store, host.shell.call, record.uuid
        for path in (store.nvram(uuid), store.kernel(uuid), store.initrd(uuid)):
            call(files.replace_if_there, _aside(path), path)
        call(tpm.swap, str(uuid))

    def discard_state(self, host: Host, record: Record) -> None:
        store, call, uuid = host.store, host.shell.call, record.uuid
        for path in (store.nvram(uuid), store.kernel(uuid), store.initrd(uuid)):
            call(files.remove, _aside(path))
        call(tpm.discard, str(uuid))

    def adapt_copy(self, domain: ElementTree.Element, record: Record) -> None:
        """systemd takes a machine id from the kernel's command line whatever its disk says (machine-id(5))."""
        for genid in domain.findall("genid"):
            domain.remove(genid)  # libvirt makes a new one
        line = domain.find("os/cmdline")
        if line is not None and "systemd" not in (domain.findtext("os/init") or ""):
            words = [word for word in (line.text or "").split() if not word.startswith("systemd.machine_id=")]
            line.text = " ".join([*words, f"systemd.machine_id={record.uuid.hex}"])

    def list_base(self, host: Host, image: Image) -> tuple[Image, dict[str, Source]]:
        from hvctl.hostside import transfer

        folder = host.store.image(image.id)
        sources = {
            part.bare.file: transfer.Source(kind=transfer.FILE, path=str(folder / part.file))
            for part in image.artefacts
        }
        return replace(image.bare, has_tree=False, tree_digest=""), sources

    def is_known_by(self, host: Host, image: Image) -> bool:
        return True  # with the digests, which `has_base` compares: a disk made of a tree is another one on each host

    def has_base(self, host: Host, image: Image, base: Image) -> bool:
        return image.bare.artefacts == base.bare.artefacts

    def read_layer(self, host: Host, layer: str) -> Source:
        from hvctl.hostside import transfer

        return transfer.Source(kind=transfer.DISK, path=str(host.store.layer_disk(layer)))

    def write_base(self, work: Building, base: Image, parts: Mapping[str, Path]) -> None:
        assert base.disk is not None
        disk = parts[base.disk.artefact.file]
        if check_overlay(work.host, disk) != base.disk.virtual_bytes or base.disk.format != "qcow2":
            raise InvalidSpec("the backup's image is not as it says", hint="restore another one")
        for name, path in parts.items():
            work.host.shell.call(files.set_mode, path, 0o444)
            work.host.shell.call(files.replace_if_there, path, work.image / name)

    def write_layer(self, host: Host, image: Image, parent: str, content: Path, aside: Path) -> None:
        """Its header is checked, and its tables by a confined qemu-img, before anything else opens it."""
        call, disk = host.shell.call, aside / "disk.qcow2"
        check_overlay(host, content)
        base, format_ = base_of(host, image) if not parent else (host.store.layer_disk(parent), "qcow2")
        call(files.make_directory, aside, 0o711)
        call(files.replace_if_there, content, disk)
        words: list[Argument] = ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", format_, "-b", base, "--", disk]
        host.shell.run(words, timeout_s=_QEMU_IMG_TIMEOUT_S)
        call(layers.seal, disk, find_reader(host))
        call(layers.write_facts, aside, layers.Facts(parent=parent))

    def merge(self, host: Host, image: Image, run: tuple[str, ...], parent: str, aside: Path) -> None:
        """A copy of the highest, into which is written what it would read from the others: the copy is nobody's yet."""
        store, call = host.store, host.shell.call
        base, format_ = base_of(host, image) if not parent else (store.layer_disk(parent), "qcow2")
        call(files.make_directory, aside, 0o711)
        disk = aside / "disk.qcow2"
        call(files.remove, disk)
        call(files.clone_file, store.layer_disk(run[-1]), disk, 0o600)
        words: list[Argument] = ["qemu-img", "rebase", "-q", "-f", "qcow2", "-F", format_, "-b", base, "--", disk]
        host.shell.run(words, timeout_s=_MERGE_TIMEOUT_S)
        call(layers.seal, disk, find_reader(host))
        call(layers.write_facts, aside, layers.Facts(parent=parent))


def check_overlay(host: Host, path: Path) -> int:
    """The size of a disk from outside. Raises InvalidSpec unless it is a plain qcow2 file of its own, sound in itself."""
    from hvctl.rootfs import confined, intake

    try:
        return intake.check_sound(host, path, limits=replace(confined.DEFAULTS, memory_bytes=4 * GIB)).virtual_bytes
    except InvalidSpec as error:
        error.hint = "restore an older backup"
        raise


def base_of(host: Host, image: Image) -> tuple[Path, str]:
    """The disk of an image and its format."""
    assert image.disk is not None
    return host.store.image(image.id) / image.disk.artefact.file, image.disk.format


def chain_of(host: Host, record: Record, image: Image) -> list[tuple[str, str]]:
    """Path and format of everything below the top of an instance's root, topmost first."""
    base, format_ = base_of(host, image)
    below = [(str(host.store.layer_disk(layer)), "qcow2") for layer in reversed(record.layers[:-1])]
    return [*below, (str(base), format_)]


def find_root(host: Host, domain: ElementTree.Element) -> ElementTree.Element | None:
    """The disk of a definition that is a layer in the store."""
    for disk in domain.iterfind("./devices/disk"):
        source = disk.find("source")
        if source is not None and Path(source.get("file", "/")).parent.parent == host.store.layers:
            return disk
    return None


def add_backing(disk: ElementTree.Element, chain: list[tuple[str, str]]) -> None:
    """Name a disk's whole backing chain, each file as one that libvirt must not give to the qemu user."""
    for old in disk.findall("backingStore"):
        disk.remove(old)
    parent = disk
    for path, format_ in chain:
        level = ElementTree.Element("backingStore", {"type": "file"})
        ElementTree.SubElement(level, "format", {"type": format_})
        source = ElementTree.SubElement(level, "source", {"file": path})
        ElementTree.SubElement(source, "seclabel", {"model": "dac", "relabel": "no"})
        at = [child.tag for child in parent].index("source") + 1
        parent.insert(at, level)
        parent = level
    ElementTree.SubElement(parent, "backingStore")


def find_reader(host: Host) -> int:
    """The group that QEMU runs as: libvirt is told to leave the owners of what is below a top alone."""
    owner = survey.find_guest_owner(host.connection(Mode.VM))
    return owner[1] if owner is not None else 0


def has_tpm(host: Host, record: Record) -> bool:
    """Whether it has a TPM of its own."""
    xml = domains.get_xml(_domain(host, record))
    return "<tpm" in xml and ElementTree.fromstring(xml).find("devices/tpm/backend[@type='emulator']") is not None


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _domain(host: Host, record: Record) -> Any:
    return domains.get(host.connection(Mode.VM), record.uuid)
