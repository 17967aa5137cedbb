"""Disks of a running domain: plugged in, taken out when the guest has let go, resized, limited."""

from __future__ import annotations

import threading
import time
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import libvirt

from hvctl.errors import GuestFailed, TimedOut
from hvctl.libvirtapi import domains
from hvctl.libvirtapi.connection import Connection
from hvctl.libvirtapi.faults import from_libvirt, in_words

_TARGETS = tuple(f"vd{letter}" for letter in "bcdefghijklmnopqrstuvwxy")
"""What a data disk may be called: `vda` is the root, `vdz` the seed."""


def find(domain: libvirt.virDomain, source: str) -> Element | None:
    """The disk of the running domain that lies at this path, as libvirt describes it, or None."""
    return find_element(ElementTree.fromstring(domains.get_xml(domain, inactive=False)), source)


def find_element(definition: Element, source: str) -> Element | None:
    """The `<disk>` of a definition that lies at this path, or None."""
    for disk in definition.iterfind("./devices/disk"):
        where = disk.find("source")
        if where is not None and source in (where.get("file"), where.get("dev")):
            return disk
    return None


def find_free_target(domain: libvirt.virDomain) -> str:
    """The first name that no disk has, in the definition or in the running domain; empty when all are taken."""
    taken = set()
    for inactive in (True, False):
        definition = ElementTree.fromstring(domains.get_xml(domain, inactive=inactive))
        taken |= {target.get("dev", "") for target in definition.iterfind("./devices/disk/target")}
    return next((target for target in _TARGETS if target not in taken), "")


def attach(domain: libvirt.virDomain, disk: Element) -> bool:
    """Plug a disk into the running domain, whose definition stays; False where it has no port free for one."""
    try:
        domain.attachDeviceFlags(ElementTree.tostring(disk, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as error:
        if "No more available PCI slots" in (error.get_error_message() or ""):
            return False
        raise from_libvirt(error, f"cannot plug a disk into {domain.name()!r}") from error
    return True


def detach(connection: Connection, domain: libvirt.virDomain, source: str, *, timeout_s: float) -> None:
    """Take a disk out of the running domain, and return when the guest has let go of it; fine when it has none.

    Raises TimedOut when the guest does not answer (it may still let go later), GuestFailed when it refuses.
    """
    disk = find(domain, source)
    if disk is None:
        return
    alias = disk.find("alias")
    name = alias.get("name", "") if alias is not None else ""
    ended, refused = threading.Event(), threading.Event()

    def on_removed(_connection: object, _domain: object, device: str, _opaque: object) -> None:
        if device == name:
            ended.set()

    def on_refused(_connection: object, _domain: object, device: str, _opaque: object) -> None:
        if device == name:
            refused.set()
            ended.set()

    attempt = f"cannot take a disk out of {domain.name()!r}"
    events = {
        libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: on_removed,
        libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED: on_refused,
    }
    with in_words(attempt), connection.watching(domain, events):
        domain.detachDeviceFlags(ElementTree.tostring(disk, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_LIVE)
        _wait(domain, source, ended, timeout_s)
    if refused.is_set():
        raise GuestFailed(f"{attempt}: the guest refused to let go of it", hint="is it in use inside? unmount it there")


def _wait(domain: libvirt.virDomain, source: str, ended: threading.Event, timeout_s: float) -> None:
    """Until the event, or until libvirt no longer has it; in slices, so that a lost connection is an error."""
    deadline_s = time.monotonic() + timeout_s
    while not ended.wait(min(1.0, max(0.0, deadline_s - time.monotonic()))):
        if find(domain, source) is None:
            return
        if time.monotonic() >= deadline_s:
            raise TimedOut(
                f"{domain.name()!r} did not let go of the disk within {timeout_s:g} s",
                hint=f"try again once it has booted, or stop it first: hvctl stop {domain.name()}",
            )


def resize(domain: libvirt.virDomain, target: str, size_bytes: int) -> None:
    """Make a disk of the running domain larger; the guest is told."""
    with in_words(f"cannot resize the disk {target} of {domain.name()!r}"):
        domain.blockResize(target, size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)


def throttle(domain: libvirt.virDomain, target: str, *, iops: int, bytes_per_s: int) -> None:
    """Limit a disk of the running domain; 0 lifts a limit."""
    with in_words(f"cannot limit the disk {target} of {domain.name()!r}"):
        limits = {
            libvirt.VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_IOPS_SEC: iops,
            libvirt.VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_BYTES_SEC: bytes_per_s,
        }
        domain.setBlockIoTune(target, limits, libvirt.VIR_DOMAIN_AFFECT_LIVE)
