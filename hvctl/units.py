"""Sizes and durations as people write them, `2GiB`, `512M`, `1.5 MB`, and moments as records do.

K, M, G, T and KiB, MiB, ... are powers of 1024, as in QEMU; KB, MB, ... are powers of 1000 (IEC 80000-13).
"""

from __future__ import annotations

import datetime
import re

from hvctl.errors import InvalidSpec

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGTP]?)(iB|B|)", re.ASCII | re.IGNORECASE)
_LARGEST_BYTES = 2**60
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def parse_size(text: str) -> int:
    """Bytes in a written size; a plain number is bytes.

    Raises InvalidSpec for anything else, for zero and for more than an exbibyte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidSpec(f"{text!r} is not a size", hint="write a number and a unit: 512M, 2GiB, 20G")
    number, prefix, suffix = match.groups()
    base = 1000 if suffix.upper() == "B" and prefix else 1024
    size_bytes = int(float(number) * base ** (" KMGTP".index(prefix.upper() or " ")))
    if not 0 < size_bytes <= _LARGEST_BYTES:
        raise InvalidSpec(f"the size {text!r} is not possible", hint="sizes go from 1 byte to 1024P")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for people, in the largest binary unit that leaves at least 1: `1.5GiB`, `512MiB`, `0B`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    text = f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"
    return text + unit


def format_duration(seconds: float) -> str:
    """A duration for people: `0.3s`, `12s`, `3m05s`, `2h10m`, `5d`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d"


def format_time(moment: datetime.datetime) -> str:
    """A moment (UTC) as records and manifests have it: ISO 8601, to the second."""
    return moment.strftime(_TIME)


def parse_time(text: str) -> datetime.datetime:
    """The moment that such a text is. Raises ValueError."""
    return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)


def now() -> str:
    """This second, as records and manifests have it."""
    return format_time(datetime.datetime.now(datetime.UTC))
