"""What libvirt does not make alike for both modes: one small interface, one module a mode."""

from __future__ import annotations

from hvctl.backends.base import Backend, Secrets, Values
from hvctl.errors import Unsupported
from hvctl.model import Mode

__all__ = ["Backend", "Secrets", "Values", "get_backend"]


def get_backend(mode: Mode) -> Backend:
    """The backend of a mode."""
    from hvctl.backends.vm import VmBackend

    backends: dict[Mode, type[Backend]] = {Mode.VM: VmBackend}
    if mode not in backends:
        raise Unsupported(f"mode {mode} is not built yet", hint="leave --container away")
    return backends[mode]()
