"""How much a container's root may take: a limit on its writable layer, where the store's file system can hold one.

A container's `disk` in its spec is a wish: what was a VM, or comes from a backup, may have a size that this host's file
system holds nobody to. Who asks for one is refused there, and whatever shows one asks `find`.
"""

from __future__ import annotations

from hvctl.errors import HostError, InvalidSpec, Unsupported
from hvctl.host import Host
from hvctl.hostside import quotas
from hvctl.model import Record
from hvctl.units import MIB, format_size

_LEAST_BYTES = 16 * MIB
_TIMEOUT_S = 10
_OTHERS = (
    "keep the store on ext4 or XFS for that, or limit data by a volume of its own: hvctl disk add NAME data --size 10G"
)
_NOT_HERE = "give {store} a file system of its own (ext4 or XFS, mounted with the option prjquota): {device} is this host's root"
_CURES = {
    "ext4": "unmount {device}, tune2fs -O project,quota {device}, and mount it with the option prjquota",
    "xfs": "mount {device} with the option prjquota (a remount does not do it)",
}


def find(host: Host, record: Record) -> int:
    """Bytes that the root of a container may take; 0 where nothing limits it, or this user may not look."""
    try:
        is_limited = host.shell.call(quotas.is_counted, host.store.layer(record.layers[-1]))
    except HostError:
        return 0
    return record.spec.disk_bytes if is_limited else 0


def find_obstacle(host: Host) -> str:
    """Why no root of a container can be limited on this host, a clause; empty when it can."""
    if host.shell.call(quotas.is_enforced, host.store.layers):
        return ""
    kind, device, _place = _find_file_system(host)
    return f"the file system of {str(host.store.layers)!r} ({kind} on {device}) keeps no project quotas"


def find_cure(host: Host) -> str:
    """What makes an end of that obstacle."""
    kind, device, place = _find_file_system(host)
    if kind in _CURES and place == "/":  # nobody can unmount that
        return _NOT_HERE.format(store=host.store.root, device=device)
    return _CURES.get(kind, _OTHERS).format(device=device)


def check(host: Host, size_bytes: int) -> None:
    """Raise Unsupported where no root can be limited, InvalidSpec for a limit that nothing could run under."""
    if obstacle := find_obstacle(host):
        raise Unsupported(f"a container's root cannot be limited here: {obstacle}", hint=find_cure(host))
    if size_bytes < _LEAST_BYTES:
        raise InvalidSpec(
            f"a root of {format_size(size_bytes)} is too small", hint=f"{format_size(_LEAST_BYTES)} or more"
        )


def check_change(host: Host, record: Record, size_bytes: int) -> None:
    """As `check`, and for what is in the writable layer already; no limit, 0, is always possible."""
    if not size_bytes:
        return
    check(host, size_bytes)
    layer = host.store.layer(record.layers[-1])
    if not host.shell.call(quotas.is_counted, layer):
        raise Unsupported(
            f"the writable layer of {record.name!r} is older than the quotas of its file system, and not counted",
            hint=f"a new one is: hvctl stop {record.name}; hvctl snapshot take {record.name}",
        )
    used_bytes = host.shell.call(quotas.measure, layer)
    if used_bytes > size_bytes:
        raise InvalidSpec(
            f"{record.name!r} has written {format_size(used_bytes)}, which does not fit into {format_size(size_bytes)}",
            hint="delete what is not needed inside, or give it more",
        )


def _find_file_system(host: Host) -> tuple[str, str, str]:
    """Kind, device, and where it is mounted."""
    words = ["df", "--output=fstype,source,target", "--", str(host.store.layers)]
    kind, device, place = host.shell.run(words, timeout_s=_TIMEOUT_S).text.splitlines()[-1].split(maxsplit=2)
    return kind, device, place
