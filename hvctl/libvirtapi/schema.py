"""libvirt's own schema for domains, without a daemon: the in-process test driver checks before it defines."""

from __future__ import annotations

import libvirt

from hvctl.libvirtapi.connection import Connection
from hvctl.libvirtapi.faults import in_words


def check_domain(xml: str) -> None:
    """Raise InvalidSpec, with libvirt's reason, when this is no valid `<domain>`."""
    connection = Connection.open("test:///default")
    try:
        with in_words("the definition is not valid for libvirt"):
            connection.handle.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    finally:
        connection.close()
