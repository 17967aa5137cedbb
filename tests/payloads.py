"""Texts that would like to be more than text: for every field that somebody may fill."""

from __future__ import annotations

from pathlib import Path

_CANARY = "/tmp/canary"
"""What some of them would make, or run."""


def aim(payload: str, canary: Path) -> str:
    """The same text with a path of the test's own in it, of which nobody else can make or remove the file."""
    return payload.replace(_CANARY, str(canary))


PAYLOADS = [
    f"</name><devices><emulator>{_CANARY}</emulator></devices><name>",
    "'/><disk type='block'><source dev='/dev/sda'/></disk><x a='",
    '"/><qemu:commandline><qemu:arg value="-monitor"/></qemu:commandline><x a="',
    "<!--",
    "--><x/><!--",
    "]]>",
    "<![CDATA[<x/>]]>",
    "&lt;x&gt;",
    "&#60;x&#62;",
    "&xxe;",
    "<?xml version='1.0'?>",
    "{{ 7 * 7 }}",
    "{% for x in range(9) %}x{% endfor %}",
    f"$(touch {_CANARY})",
    "`id`; rm -rf /",
    "a,file=/etc/shadow",
    f"-oProxyCommand=touch {_CANARY}",
    "../../../etc/passwd",
    "line\nbreak",
    "nul\0byte",
    "bell\x07",
    "\u202egnp.exe",
    "\u2028separator",
    "x" * 300,
]
