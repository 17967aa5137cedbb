"""One command to the QEMU guest agent, through libvirt (virDomainQemuAgentCommand)."""

from __future__ import annotations

import json
from typing import Any

import libvirt

from hvctl.errors import GuestFailed, HvctlError, TimedOut
from hvctl.libvirtapi.faults import AGENT_COMMAND_FAILED, AGENT_COMMAND_TIMEOUT, from_libvirt


def command(domain: libvirt.virDomain, name: str, arguments: dict[str, object], *, timeout_s: int) -> Any:
    """What the agent returns (https://qemu.readthedocs.io/en/v7.2.0/interop/qemu-ga-ref.html).

    Raises GuestFailed when no agent is connected or it refuses, TimedOut when it is silent.
    """
    import libvirt_qemu

    request = json.dumps({"execute": name, "arguments": arguments} if arguments else {"execute": name})
    try:
        answer = libvirt_qemu.qemuAgentCommand(domain, request, timeout_s, 0)
    except libvirt.libvirtError as error:
        raise _in_words(error, domain.name(), name, timeout_s) from error
    return json.loads(answer)["return"]


def _in_words(error: libvirt.libvirtError, instance: str, name: str, timeout_s: int) -> HvctlError:
    text = error.get_error_message() or ""
    if error.get_error_code() == AGENT_COMMAND_TIMEOUT or ("time" in text and "out" in text):
        return TimedOut(
            f"the guest agent of {instance!r} did not answer within {timeout_s} s", hint=f"try: hvctl ssh {instance}"
        )
    if error.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
        return GuestFailed(
            f"the guest agent of {instance!r} is not connected",
            hint=f"it may still be booting, or lack qemu-guest-agent; try: hvctl ssh {instance}",
        )
    if error.get_error_code() in (libvirt.VIR_ERR_INTERNAL_ERROR, AGENT_COMMAND_FAILED):
        return GuestFailed(
            f"the guest agent of {instance!r} refused {name!r}: {text}", hint=f"try: hvctl ssh {instance}"
        )
    return from_libvirt(error, f"cannot ask the guest agent of {instance!r}")
