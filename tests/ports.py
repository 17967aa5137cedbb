"""Ports on loopback for servers that want a number."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def kept() -> Iterator[int]:
    """A free port that the kernel gives to nobody else for the block, in which a server is to begin to listen there.

    It may, where it sets SO_REUSEADDR, as servers do: what else is bound there does not listen (socket(7)).
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]
