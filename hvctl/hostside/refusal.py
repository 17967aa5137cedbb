"""What a confined worker says when it will not go on: one line on stderr, and a status that tells whose fault it is."""

from __future__ import annotations

import errno
import os
import sys
from types import TracebackType

REFUSED = 65
"""The input is bad (EX_DATAERR of sysexits.h)."""
UNABLE = 74
"""The host cannot do it: no space, mostly (EX_IOERR)."""
FAILED = 70
"""Our own mistake (EX_SOFTWARE)."""

PROGRESS = "progress "
"""Begins a line of stderr that tells how many bytes of the input have been read."""
PERCENT = "percent "
"""Begins one that tells how far a program of others' says that it is."""

_LONGEST_NAME = 80


class Refused(Exception):
    """The input is not acceptable; says why, without the object's name."""


class Unable(Exception):
    """The host cannot do it: its file system is full, a program is missing."""


def quote(name: bytes) -> str:
    """A name for a message: one line, printable whatever it holds, its end where it is long."""
    text = ascii(os.fsdecode(name))
    return text if len(text) <= _LONGEST_NAME else f"'...{text[-_LONGEST_NAME:]}"


def give_up(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """An excepthook: one line and the status. A bug says what it is, without a trace."""
    status, text = describe(error)
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    os._exit(status)


def describe(error: BaseException) -> tuple[int, str]:
    """The status and the line for it."""
    match error:
        case Refused():
            return REFUSED, str(error)
        case Unable():
            return UNABLE, str(error)
        case MemoryError():
            return REFUSED, "it takes more memory than it may"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return UNABLE, "the file system is full"
        case OSError(errno=errno.EFBIG):
            return REFUSED, "it has a longer file than it may"
        case OSError():
            return FAILED, f"{error.strerror} ({quote(os.fsencode(error.filename or ''))})"
    return FAILED, f"{type(error).__name__}: {ascii(str(error))[:200]}"
