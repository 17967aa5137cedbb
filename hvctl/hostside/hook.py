"""What libvirt's `qemu` hook does for hvctl: the filter for a guest, before it runs and after it has ended.

Called as `hook NAME OPERATION SUB-OPERATION EXTRA` with the domain's XML on stdin
(https://libvirt.org/hooks.html). It never calls libvirt, which waits for it, and is quick. A domain that hvctl did not
make costs one look at its text.
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree

from hvctl.hostside import filters

_URI = "urn:hvctl"
_LIMIT_BYTES = 4 * 1024 * 1024


def main(arguments: list[str]) -> int:
    """The exit code for libvirt: not 0 refuses a start. Only a filter that cannot be made refuses one."""
    operation, sub_operation = [*arguments, "", "", ""][2:4]
    text = sys.stdin.buffer.read(_LIMIT_BYTES).decode(errors="replace")
    if _URI not in text:
        return 0
    guest = find_guest(text)
    if guest is None:
        return 0
    try:
        match operation, sub_operation:
            case "prepare", "begin":
                filters.admit(guest)
            case "reconnect", _:
                filters.admit(guest)
            case "release", "end":
                filters.dismiss(guest)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"hvctl: the filter of {guest.device}: {error}\n")  # libvirt puts it into its own error
        return 1 if operation == "prepare" else 0
    return 0


def find_guest(text: str) -> filters.Guest | None:
    """The guest's interface as hvctl's record in the domain's metadata names it; None while it has no address yet."""
    try:
        interface = ElementTree.fromstring(text).find(f"./metadata/{{{_URI}}}instance/{{{_URI}}}interface")
    except ElementTree.ParseError:
        return None
    if interface is None or not interface.get("address"):
        return None
    return filters.Guest(interface.get("device", ""), interface.get("mac", ""), interface.get("address", ""))
