"""The kernel's keyrings (keyrings(7)): what a login or a service keeps there is nobody's inside a guest."""

from __future__ import annotations

import ctypes
import errno
import os

# keyctl(2), for which the C library has no function: its number by machine, in <asm/unistd.h>.
_NUMBERS = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "loongarch64": 219, "ppc64le": 271, "s390x": 280}
_JOIN_SESSION_KEYRING = 1
_NONE = (errno.ENOSYS, errno.EPERM)
_libc = ctypes.CDLL(None, use_errno=True)


def leave() -> None:
    """Leave the session keyring for a new and empty one, for this process and what it starts from now on.

    Fine with a kernel that has none, and where keyctl(2) is forbidden (a container of others): so it is to what is started.
    Raises OSError otherwise, since what is not left would be handed on.
    """
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of keyctl(2) is not known for {os.uname().machine}")
    if _libc.syscall(number, _JOIN_SESSION_KEYRING, None) < 0 and ctypes.get_errno() not in _NONE:
        raise OSError(ctypes.get_errno(), "the session keyring cannot be left")
