"""libvirt's errors in hvctl's words: one table from error code to class, message and hint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import libvirt

from hvctl.errors import (
    AlreadyExists,
    GuestFailed,
    HostError,
    HvctlError,
    InvalidSpec,
    LibvirtFailed,
    NotFound,
    TimedOut,
    WrongState,
)

# Newer than the oldest libvirt that we are built against (9.0); no error has the number -1 or -2.
AGENT_COMMAND_TIMEOUT = getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", -1)
AGENT_COMMAND_FAILED = getattr(libvirt, "VIR_ERR_AGENT_COMMAND_FAILED", -2)

# https://libvirt.org/html/libvirt-virterror.html#virErrorNumber
_CLASSES: dict[int, type[HvctlError]] = {
    libvirt.VIR_ERR_NO_DOMAIN: NotFound,
    libvirt.VIR_ERR_NO_NETWORK: NotFound,
    libvirt.VIR_ERR_DOM_EXIST: AlreadyExists,
    libvirt.VIR_ERR_NETWORK_EXIST: AlreadyExists,
    libvirt.VIR_ERR_OPERATION_INVALID: WrongState,
    libvirt.VIR_ERR_XML_ERROR: InvalidSpec,
    libvirt.VIR_ERR_XML_DETAIL: InvalidSpec,
    libvirt.VIR_ERR_XML_INVALID_SCHEMA: InvalidSpec,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: InvalidSpec,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: GuestFailed,
    AGENT_COMMAND_TIMEOUT: TimedOut,
    AGENT_COMMAND_FAILED: GuestFailed,
    libvirt.VIR_ERR_OPERATION_TIMEOUT: TimedOut,
    libvirt.VIR_ERR_NO_CONNECT: HostError,
    libvirt.VIR_ERR_ACCESS_DENIED: HostError,
    libvirt.VIR_ERR_AUTH_FAILED: HostError,
    libvirt.VIR_ERR_AUTH_CANCELLED: HostError,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE: HostError,
    libvirt.VIR_ERR_LIBSSH: HostError,
}

_DENIED = {
    libvirt.VIR_ERR_ACCESS_DENIED,
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_CANCELLED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
}


@contextlib.contextmanager
def in_words(attempt: str) -> Iterator[None]:
    """Turn a libvirtError raised in the block into the HvctlError for it; `attempt` is "cannot start 'web'"."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise from_libvirt(error, attempt) from error


def from_libvirt(error: libvirt.libvirtError, attempt: str) -> HvctlError:
    """The HvctlError for a libvirtError."""
    code = error.get_error_code()
    text = (error.get_error_message() or str(error)).strip().replace("\n", " ")
    if code == libvirt.VIR_ERR_HOOK_SCRIPT_FAILED and "hvctl: " in text:
        said, _, hint = text.rpartition("hvctl: ")[2].partition("; next: ")  # as `hook.give_up` writes it
        return HostError(f"{attempt}: {said}", hint=hint or "hvctl host doctor")
    if is_lost(error):
        return HostError(f"{attempt}: libvirtd went away or does not answer ({text})", hint="hvctl host doctor")
    if "No space left" in text or "os error 28" in text:
        return HostError(f"{attempt}: no space left on the host ({text})", hint="free some space: hvctl host doctor")
    if code in _DENIED or "Permission denied" in text:
        return HostError(
            f"{attempt}: no permission ({text})", hint="run it as root, or join the group 'libvirt' and log in again"
        )
    if code == libvirt.VIR_ERR_OPERATION_FAILED and "already exists" in text:
        return AlreadyExists(f"{attempt}: {text}", hint="choose another name, or see: hvctl list")
    return _CLASSES.get(code, LibvirtFailed)(f"{attempt}: {text}", hint=_hint(code, text))


def is_lost(error: libvirt.libvirtError) -> bool:
    """Whether the connection itself is gone, not just the call refused."""
    text = error.get_error_message() or ""
    return (
        error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
        and any(sign in text for sign in ("Cannot recv data", "Cannot write data", "Failed to connect", "End of file"))
    ) or any(sign in text for sign in ("client socket is closed", "keepalive", "connection closed due to"))


def _hint(code: int, text: str) -> str:
    if "network" in text and "not active" in text:
        return "start it: hvctl host setup"
    if "TPM version" in text or "find 'swtpm" in text:
        return "install what emulates a TPM (Debian: swtpm swtpm-tools), then restart libvirtd"
    if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
        return "the guest may still be booting, or has no qemu-guest-agent; try `hvctl ssh`"
    if code in (libvirt.VIR_ERR_XML_ERROR, libvirt.VIR_ERR_XML_INVALID_SCHEMA, libvirt.VIR_ERR_CONFIG_UNSUPPORTED):
        return "look at the definition with --print-xml"
    return ""
