"""Waiting for a child process with a deadline, woken by its end."""

from __future__ import annotations

import os
import select


def ends_within(process: int, timeout_s: float) -> bool:
    """Whether a child ends in so many seconds; it is left to be waited for (waitpid(2))."""
    handle = os.pidfd_open(process)
    try:
        return is_over(handle, timeout_s)
    finally:
        os.close(handle)


def is_over(handle: int, timeout_s: float) -> bool:
    """Whether the process of a pidfd ends in so many seconds."""
    ended = select.poll()  # not select(2), which knows no descriptor above 1023
    ended.register(handle, select.POLLIN)
    return bool(ended.poll(timeout_s * 1000))
