"""What an instance takes of its host at this moment: the numbers by which a VM and a container can be compared."""

from __future__ import annotations

from hvctl.backends import get_backend
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import query
from hvctl.model import Instance
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One look at one instance."""

    instance: Instance
    memory_bytes: int
    """Memory of the host that it holds, the page cache of its files included; 0 when it is off."""
    disk_bytes: int
    """What its own files and layers take on the host's disk; shared images are not counted."""


def measure(host: Host, name: str) -> Usage:
    """Look at one instance. Raises NotFound, and HostError where this user may not look into the store."""
    instance = query.get(host, name)
    record, store = instance.record, host.store
    paths = [store.instance(record.uuid), *(store.layer(layer) for layer in record.layers)]
    paths += [store.volume(disk.volume) for disk in record.disks if disk.volume]
    return Usage(
        instance=instance,
        memory_bytes=get_backend(record.mode).measure_memory(host, record),
        disk_bytes=sum(host.shell.call(files.disk_usage, path) for path in paths),
    )
