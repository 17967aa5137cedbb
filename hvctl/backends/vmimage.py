"""What `image publish` does with a VM: held still with everything written, its chain of disks made one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvctl.access import agent
from hvctl.backends import vmlayers
from hvctl.errors import GuestFailed, HvctlError, TimedOut, Unsupported
from hvctl.host import Host
from hvctl.hostside import diskfiles, files, sandbox
from hvctl.libvirtapi import domains
from hvctl.model import Disk, Image, Record, State
from hvctl.rootfs import rawdisk
from hvctl.rootfs.building import Building, check_space
from hvctl.rootfs.rawdisk import RawDisk
from hvctl.units import GIB

_PING_TIMEOUT_S = 2
_FREEZE_TIMEOUT_S = 10
_THAW_TRIES = 8
_THAW_PAUSE_S = 0.25
_AS_THEY_ARE = "its file systems are taken as they are, as after a power cut"


def hold(host: Host, domain: Any) -> str:
    """Let it write everything and stop; a line for the user where it could not do the first."""
    note = ""
    try:
        agent.ping(domain, timeout_s=_PING_TIMEOUT_S)
    except HvctlError as error:  # a silent agent would freeze whenever it wakes up: it is not asked
        note = f"{_AS_THEY_ARE}: {error.message}"
    else:
        try:
            agent.freeze(domain, timeout_s=_FREEZE_TIMEOUT_S)
        except HvctlError as error:
            _thaw(host, domain)
            note = f"{_AS_THEY_ARE}: {error.message}"
    domains.pause(domain)  # QEMU flushes its own caches, too
    return note


def release(host: Host, domain: Any) -> None:
    """Let it go on; fine when it does, or is off."""
    live = domains.describe(domain).live
    if live.state is State.PAUSED:
        domains.resume(domain)
    if live.state in (State.PAUSED, State.RUNNING):
        _thaw(host, domain)


def export_root(work: Building, record: Record, image: Image, top: Path, *, keep_identity: bool) -> Image:
    """The image that a VM has become: its disk, and the kernel that it boots."""
    host, call = work.host, work.host.shell.call
    chain_bytes = sum(call(files.disk_usage, host.store.layer(layer)) for layer in record.layers)
    chain_bytes += image.disk.artefact.size_bytes if image.disk else 0
    check_space(host, f"publishing {record.name!r}", 2 * chain_bytes + GIB // 4)
    work.tell("copying the disk", 10)
    raw = copy_disk(work, record, image, top)
    if not keep_identity:
        work.tell("removing its identity", 50)
        _remove_identity(raw, record)
    raw.trim()
    work.tell("making the disk", 60)
    target = work.image / "disk.qcow2"
    raw.convert(target)
    boot = [host.store.kernel(record.uuid), host.store.initrd(record.uuid)] if record.kernel_release else []
    for path in boot:
        call(files.clone_file, path, work.image / path.name, 0o444)
    work.tell("computing digests", 90)
    kernel, initrd = [work.artefact(work.image / path.name) for path in boot] or (None, None)
    return replace(
        image,
        disk=Disk(artefact=work.artefact(target), format="qcow2", virtual_bytes=raw.virtual_bytes),
        kernel=kernel,
        initrd=initrd,
        kernel_release=record.kernel_release,
        has_tree=False,
        tree_digest="",
    )


def copy_disk(work: Building, record: Record, image: Image, top: Path) -> RawDisk:
    """What its guest sees, with this file as the top of its root, raw in the building's directory; copied confined."""
    chain = [(str(top), "qcow2"), *vmlayers.chain_of(work.host, record, image)]
    virtual_bytes = work.host.shell.call(diskfiles.read_qcow2_size, top)
    raw = RawDisk(work=work, subject=record.name, virtual_bytes=virtual_bytes)
    words = ("qemu-img", "convert", "-p", "-O", "raw", "--", _name_chain([kind for _path, kind in chain]), rawdisk.NAME)
    raw.run(*words, read_only=[Path(path) for path, _kind in chain], task="copying the disk")
    return raw


def _name_chain(formats: list[str]) -> str:
    """A disk and all that it stands on, topmost first, as qemu-img is told where a confined one finds them."""
    node: dict[str, object] = {}
    for number in reversed(range(len(formats))):
        file = {"driver": "file", "filename": sandbox.place_input(number)}
        below = {"backing": node} if node else {}
        node = {"driver": formats[number], "file": file, **below}
    return f"json:{json.dumps(node)}"


def _remove_identity(raw: RawDisk, record: Record) -> None:
    root, _parts = raw.find_root()
    if root is None or not root.is_root:
        kind = f"is on {root.kind}" if root else "cannot be found"
        raise Unsupported(
            f"cannot remove the identity (host keys, machine id) of {record.name!r}: its root {kind}",
            hint="remove it inside, then publish with --keep-identity",
        )
    raw.remove_identity(root)


def _thaw(host: Host, domain: Any) -> None:
    """Until its agent says that nothing is frozen; one that does not answer has heard of no freeze that it could tell."""
    for _try in range(_THAW_TRIES):
        try:
            agent.ping(domain, timeout_s=_PING_TIMEOUT_S)
            if agent.thaw(domain, timeout_s=_FREEZE_TIMEOUT_S):
                return
        except TimedOut:
            pass
        except GuestFailed:  # no agent is connected
            return
        host.pause(_THAW_PAUSE_S)
