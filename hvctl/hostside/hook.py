"""What libvirt's `qemu` and `lxc` hooks do for hvctl: a guest's filter and a container's root, before it runs and after.

Called as `hook NAME OPERATION SUB-OPERATION EXTRA` with the domain's XML on stdin
(https://libvirt.org/hooks.html). It never calls libvirt, which waits for it, and is quick. A domain that hvctl did not
make costs one look at its text.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # not typing's: importing that costs more than all else here (a start calls this four times)
if TYPE_CHECKING:
    from types import TracebackType
    from xml.etree.ElementTree import Element

    from hvctl.hostside import confine, filters, roots, volumes

_URI = "urn:hvctl"
_NS = f"{{{_URI}}}"
_LIMIT_BYTES = 4 * 1024 * 1024
# Before they are finished or undone, what they are on is neither the one thing nor the other.
_NOT_TO_BE_STARTED = ("create", "copy", "snapshot-revert")
_OPERATIONS = (("prepare", "begin"), ("started", "begin"), ("reconnect", "begin"), ("release", "end"))


def main(arguments: list[str]) -> None:
    """Do what this call asks for. Whatever fails is raised, and ends in `give_up`."""
    sys.excepthook = give_up
    _program, name, operation, sub_operation, *_extra = arguments
    if (operation, sub_operation) not in _OPERATIONS:
        return
    text = sys.stdin.buffer.read(_LIMIT_BYTES)
    if _URI.encode() not in text:
        return
    from xml.etree import ElementTree  # here: other people's domains do not pay for it

    domain = ElementTree.fromstring(text)
    record = domain.find(f"./metadata/{_NS}instance")
    if record is None:
        return
    if operation == "prepare":
        prepare(name, domain, record)
    elif operation == "release":
        release(name, domain, record)
    elif operation == "reconnect":
        filter_in(record)
    else:
        confine_(domain, record)


def prepare(name: str, domain: Element, record: Element) -> None:
    """Before it starts. Raises what forbids it."""
    pending = record.find(f"{_NS}pending")
    if pending is not None and pending.get("verb") in _NOT_TO_BE_STARTED:
        raise OSError("it is not complete; next: hvctl gc")
    import contextlib

    from hvctl.hostside import filters

    guest, root = find_guest(record), find_root(domain, record)
    if root is not None:
        from hvctl.hostside import confine, daemons, files, roots

        confine.release(name, root.uuid)
        if any(source.get("dir", "").startswith(f"{daemons.LXCFS}/") for source in domain.iterfind(".//source")):
            daemons.ensure_lxcfs()  # before others are kept waiting: it may have to be started
    with filters.admitting(guest) if guest else contextlib.nullcontext():
        if root is not None:
            confine.make_groups(name, root.uuid, find_limits(record))
            roots.mount(root, [target.get("dir", "") for target in domain.iterfind("./devices/filesystem/target")])
            files.remove(root.directory / "output" / "status")  # an application's last one


def release(name: str, domain: Element, record: Element) -> None:
    """After it has ended, or failed to start."""
    import contextlib

    from hvctl.hostside import filters

    guest, root = find_guest(record), find_root(domain, record)
    with contextlib.ExitStack() as after:  # whatever one of them meets, the others are done
        if root is not None:
            from hvctl.hostside import confine, roots

            after.callback(confine.release, name, root.uuid)
            after.callback(roots.unmount, root.directory)
        if guest is not None:
            filters.dismiss(guest)


def filter_in(record: Element) -> None:
    """Let it speak as itself, and only so."""
    from hvctl.hostside import filters

    guest = find_guest(record)
    if guest is not None:
        filters.admit(guest)


def confine_(domain: Element, record: Element) -> None:
    """Its limits, where its root cannot lift them. libvirt's identifier of a container is its controller's process."""
    if record.find(f"{_NS}container") is not None:
        from hvctl.hostside import confine

        confine.hold(int(domain.get("id", "")), find_limits(record))
        if has_volumes(record):
            add_volumes(domain, record)


def find_guest(record: Element) -> filters.Guest | None:
    """The guest's interface as hvctl's record names it; None while it has no address yet."""
    from hvctl.hostside import filters

    interface = record.find(f"{_NS}interface")
    if interface is None or not interface.get("address"):
        return None
    return filters.Guest(interface.get("device", ""), interface.get("mac", ""), interface.get("address", ""))


def find_root(domain: Element, record: Element) -> roots.Root | None:
    """What a container stands on; None for a VM, whose disks need nobody."""
    container = record.find(f"{_NS}container")
    if container is None:
        return None
    from pathlib import Path

    from hvctl.hostside import roots
    from hvctl.store import Store

    shares = tuple(
        roots.Share(
            source=Path(share.attrib["source"]),
            is_read_only=share.get("read-only") == "yes",
            uid=int(share.attrib["uid"]),
            gid=int(share.attrib["gid"]),
        )
        for share in record.iterfind(f"{_NS}spec/{_NS}mount")
    )
    root, spec = record.find(f"{_NS}root"), record.find(f"{_NS}spec")
    assert root is not None and spec is not None
    return roots.Root(
        store=Store(root=Path(record.attrib["store"]), run=Path()),
        uuid=domain.findtext("uuid", ""),
        image_id=root.attrib["image"],
        layers=tuple(layer.attrib["id"] for layer in root.iterfind(f"{_NS}layer")),
        first_id=int(container.attrib["first-id"]),
        size_bytes=int(spec.get("disk", "0")),
        shares=shares,
        volumes=tuple((name, volume) for name, _target, volume in find_volumes(record)) if has_volumes(record) else (),
    )


def has_volumes(record: Element) -> bool:
    """Whether there is anything to import for."""
    return record.find(f"{_NS}disk") is not None


def find_volumes(record: Element) -> list[tuple[str, str, volumes.Volume]]:
    """A container's data volumes: identifier, where they are seen inside, and the volume."""
    from pathlib import Path

    from hvctl.hostside import volumes
    from hvctl.store import Store

    container, store = record.find(f"{_NS}container"), Store(root=Path(record.attrib["store"]), run=Path())
    assert container is not None
    found = []
    for disk in record.iterfind(f"{_NS}disk"):
        volume = volumes.Volume(
            path=store.volume_content(disk.attrib["volume"], disk.attrib["format"]),
            first_id=int(container.attrib["first-id"]),
            is_read_only=disk.get("read-only") == "yes",
        )
        found.append((disk.attrib["volume"], disk.get("target", ""), volume))
    return found


def add_volumes(domain: Element, record: Element) -> None:
    """Volumes that were added while it ran, to a container that restarts itself: libvirt starts it as it was."""
    import contextlib

    from hvctl.hostside import volumes

    seen = {target.get("dir") for target in domain.iterfind("./devices/filesystem/target")}
    for _name, target, volume in find_volumes(record):
        if target not in seen:
            with contextlib.suppress(OSError):  # its directory is gone: nothing to end a container for
                volumes.mount_inside(int(domain.get("id", "")), volume, target)


def find_limits(record: Element) -> confine.Limits:
    """What was asked for a container."""
    from hvctl.hostside import confine

    spec, container = record.find(f"{_NS}spec"), record.find(f"{_NS}container")
    assert spec is not None and container is not None
    return confine.Limits(
        first_id=int(container.attrib["first-id"]),
        memory_bytes=int(spec.attrib["memory"]),
        cpus=int(spec.attrib["cpus"]),
        processes=int(spec.get("processes", "0")) or confine.DEFAULT_PROCESSES,
    )


def give_up(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """One line for libvirt, which shows it to whoever starts the guest, and for syslog; then the exit code.

    What fails may say what to do, after "; next: ".

    Only a start is refused: libvirt kills a running guest whose hook fails at `reconnect`, and our own mistakes count
    as failures too.
    """
    import syslog

    name, operation = [*sys.argv, "", ""][1:3]
    what = str(error) if issubclass(kind, OSError) else f"{kind.__name__}: {error}"
    line = f"hvctl: {name!r} failed at {operation}: {what}"
    syslog.syslog(syslog.LOG_ERR, line)
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
    # A container that cannot be confined does not go on: libvirt ends it when this fails at `started`.
    os._exit(1 if operation in ("prepare", "started") else 0)
