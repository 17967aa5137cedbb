"""What libvirt does not make alike for both modes: one small interface, one module a mode."""

from __future__ import annotations

from hvctl.backends.base import Backend, Feature, Secrets, Values, list_features
from hvctl.backends.disks import DiskRequest
from hvctl.model import Mode

__all__ = ["Backend", "DiskRequest", "Feature", "Secrets", "Values", "features", "get_backend"]


def get_backend(mode: Mode) -> Backend:
    """The backend of a mode."""
    if mode is Mode.VM:
        from hvctl.backends.vm import VmBackend

        return VmBackend()
    from hvctl.backends.container import ContainerBackend

    return ContainerBackend()


def features() -> tuple[Feature, ...]:
    """What not every mode can."""
    return list_features(tuple(get_backend(mode) for mode in Mode))
