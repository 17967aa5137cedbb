"""The log file: every program that was run and every definition that was made, for the day something went wrong."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

from hvctl.config import state_home

_LIMIT_BYTES = 4 * 1024**2
_FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"


def start() -> None:
    """Log to $XDG_STATE_HOME/hvctl/hvctl.log (0600, one older file is kept); silently none where that cannot be."""
    root = logging.getLogger("hvctl")
    root.setLevel(logging.DEBUG)
    root.propagate = False
    root.addHandler(logging.NullHandler())
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() and path.stat().st_size > _LIMIT_BYTES:
            path.rename(path.with_name("hvctl.log.1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        handler = logging.StreamHandler(os.fdopen(descriptor, "a", encoding="utf-8", errors="replace"))
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)


def show_on_stderr() -> None:
    """Show the log on stderr too (`-v`)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(relativeCreated)6d ms %(message)s"))
    logging.getLogger("hvctl").addHandler(handler)


def note(error: Exception) -> str:
    """Log where a failure that nobody expected came from; what to do about it."""
    logging.getLogger("hvctl").error("internal error", exc_info=error)
    path = _file()
    return f"report it, with {path}" if os.access(path, os.W_OK) else "report it, with what -v shows"


def _file() -> Path:
    return state_home() / "hvctl.log"
