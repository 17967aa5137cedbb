"""What a part of the setup is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field

from hvctl.host import Host
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change to the host: what it is, in words that follow "would", and how it is made."""

    text: str
    apply: Callable[[], object] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the setup."""

    Finder = Callable[[Host], Iterator[Change]]

    name: str
    missing: Finder
    """Changes that setup would make."""
    present: Finder
    """Changes that teardown would make."""
