"""Whether sshd is there yet: one quick try at its identification string (RFC 4253, 4.2)."""

from __future__ import annotations

import socket
from enum import Enum

from hvctl.model import Endpoint

# An early SYN without an ARP answer would otherwise cost the kernel's first retransmission, a whole second.
_CONNECT_TIMEOUT_S = 0.1
# Under emulation sshd needs a while from accept to banner.
_BANNER_TIMEOUT_S = 2.0


class Reach(Enum):
    """How far a try came."""

    NOTHING = "nothing answers"
    REFUSED = "the address answers, the port does not"
    SILENT = "connected, but no banner"
    BANNER = "an ssh server"


def probe(endpoint: Endpoint) -> Reach:
    """Try once; takes at most some two seconds."""
    try:
        connection = socket.create_connection((endpoint.address, endpoint.port), timeout=_CONNECT_TIMEOUT_S)
    except ConnectionRefusedError:
        return Reach.REFUSED
    except OSError:
        return Reach.NOTHING
    with connection:
        connection.settimeout(_BANNER_TIMEOUT_S)
        try:
            return Reach.BANNER if connection.recv(256).startswith(b"SSH-") else Reach.SILENT
        except OSError:
            return Reach.SILENT
