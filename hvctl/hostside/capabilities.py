"""Giving up capabilities of this process, for good where `no_new_privs` is set (capabilities(7))."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3, capset(2)
_NUMBERS = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_SETFCAP": 31}


def keep(names: Sequence[str]) -> None:
    """Give up all others. Raises OSError when one of them is not held."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    kept = sum(1 << _NUMBERS[name] for name in names)
    # Twice effective, permitted, inheritable: for numbers below 32, and above.
    if libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
