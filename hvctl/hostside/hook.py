"""What libvirt's `qemu` hook does for hvctl: the filter for a guest, before it runs and after it has ended.

Called as `hook NAME OPERATION SUB-OPERATION EXTRA` with the domain's XML on stdin
(https://libvirt.org/hooks.html). It never calls libvirt, which waits for it, and is quick. A domain that hvctl did not
make costs one look at its text.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvctl.hostside import filters

_URI = "urn:hvctl"
_LIMIT_BYTES = 4 * 1024 * 1024


def main(arguments: list[str]) -> None:
    """Do what this call asks for. Whatever fails is raised, and ends in `give_up`."""
    sys.excepthook = give_up
    _program, _name, operation, sub_operation, *_extra = arguments
    if (operation, sub_operation) not in (("prepare", "begin"), ("reconnect", "begin"), ("release", "end")):
        return
    text = sys.stdin.buffer.read(_LIMIT_BYTES)
    if _URI.encode() not in text:
        return
    from hvctl.hostside import filters  # here: other people's domains do not pay for it

    guest = find_guest(text)
    if guest is not None:
        (filters.dismiss if operation == "release" else filters.admit)(guest)


def find_guest(text: bytes) -> filters.Guest | None:
    """The guest's interface as hvctl's record in the domain's metadata names it; None while it has no address yet."""
    from xml.etree import ElementTree

    from hvctl.hostside import filters

    interface = ElementTree.fromstring(text).find(f"./metadata/{{{_URI}}}instance/{{{_URI}}}interface")
    if interface is None or not interface.get("address"):
        return None
    return filters.Guest(interface.get("device", ""), interface.get("mac", ""), interface.get("address", ""))


def give_up(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """One line for libvirt, which shows it to whoever starts the guest, and for syslog; then the exit code.

    Only a start is refused: libvirt kills a running guest whose hook fails at `reconnect`, and our own mistakes count
    as failures too.
    """
    import syslog

    name, operation = [*sys.argv, "", ""][1:3]
    line = f"hvctl: the filter of {name!r} failed at {operation}: {kind.__name__}: {error}"
    syslog.syslog(syslog.LOG_ERR, line)
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
    os._exit(1 if operation == "prepare" else 0)
