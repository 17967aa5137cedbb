"""Ranges of uids and gids for containers: 65,536 each, none shared by two.

They come from the part of the 32-bit space that no convention gives to anybody (https://systemd.io/UIDS-GIDS: 524288
to 1879048191 is systemd-nspawn's, ids from 2147483648 on are trouble), so neither useradd's subordinate ids nor another
container manager's are touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from hvctl.hostside import locks

COUNT = 65536
"""Ids of one container: all that fit in 16 bits, `nobody` (65534) among them."""
_FIRST, _END = 0x70000000, 0x80000000
_LOCK = Path("/run/hvctl-ids.lock")
_DELEGATED = (Path("/etc/subuid"), Path("/etc/subgid"))
_TIMEOUT_S = 120  # a hundred may wait for one another


def choosing() -> contextlib.AbstractContextManager[None]:
    """Held from the look at what is taken until the choice stands in libvirt; of the machine, not of a store."""
    return locks.hold(_LOCK, timeout_s=_TIMEOUT_S)


def find_free(taken: Iterable[tuple[int, int]]) -> int:
    """The first id of the lowest range that overlaps none of these (first id, count). Raises OSError when none is left."""
    occupied = {block for first, count in taken for block in _blocks(first, count)}
    for first in range(_FIRST, _END, COUNT):
        if first not in occupied:
            return first
    raise OSError(f"all {(_END - _FIRST) // COUNT} ranges of ids for containers are taken")


def list_delegated() -> list[tuple[int, int]]:
    """What subuid(5) and subgid(5) give to users and other programs."""
    found = []
    for path in _DELEGATED:
        for line in path.read_text().splitlines() if path.exists() else []:
            words = line.strip().split(":")
            if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
                found.append((int(words[1]), int(words[2])))
    return found


def _blocks(first: int, count: int) -> range:
    """The first ids of all our ranges that such a one touches."""
    start = max(_FIRST, first - first % COUNT)
    return range(start, min(_END, first + count), COUNT)
