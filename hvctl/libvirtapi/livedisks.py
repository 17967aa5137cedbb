"""The root disk of a running VM: switched to a new overlay, with or without its memory kept; and brought back."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import libvirt

from hvctl.libvirtapi.connection import Connection
from hvctl.libvirtapi.faults import in_words


def switch(domain: libvirt.virDomain, xml: str, folder: Path, overlay: Path, memory: Path | None) -> None:
    """Let a running VM write to an overlay that was made for it; libvirt keeps no snapshot of its own.

    `xml`: its running definition, of which the disk that is a layer in `folder` is meant. Both definitions name the
    overlay afterwards. With `memory` the guest stands still until its memory is in that file.
    """
    request = ElementTree.Element("domainsnapshot")
    if memory is not None:
        ElementTree.SubElement(request, "memory", {"snapshot": "external", "file": str(memory)})
    disks = ElementTree.SubElement(request, "disks")
    for disk in ElementTree.fromstring(xml).iterfind("./devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is None:
            continue
        is_root = source is not None and Path(source.get("file", "/")).parent.parent == folder
        kind = "external" if is_root else "no"
        entry = ElementTree.SubElement(disks, "disk", {"name": target.get("dev", ""), "snapshot": kind})
        if is_root:
            ElementTree.SubElement(entry, "source", {"file": str(overlay)})
            ElementTree.SubElement(entry, "driver", {"type": "qcow2"})
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_VALIDATE
    )
    if memory is None:
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    with in_words(f"cannot take a snapshot of {domain.name()!r}"):
        domain.snapshotCreateXML(ElementTree.tostring(request, encoding="unicode"), flags)


def get_saved_xml(connection: Connection, memory: Path) -> str:
    """The definition that a file of kept memory was written with."""
    with in_words(f"cannot read {str(memory)!r}"):
        return str(connection.handle.saveImageGetXMLDesc(str(memory), 0))


def restore(connection: Connection, memory: Path, xml: str) -> None:
    """Start a VM with kept memory under a definition that may differ in its disks' files. Raises HvctlError."""
    with in_words("cannot bring the memory back"):
        connection.handle.restoreFlags(str(memory), xml, libvirt.VIR_DOMAIN_SAVE_RUNNING)
