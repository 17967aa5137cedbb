"""The command line as a user runs it, in a process of its own; and in this one, where only what it does and says matters."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hvctl.cli.app import App
from hvctl.cli.main import run_command
from hvctl.config import Config

TIMEOUT_S = 240


@dataclass(frozen=True)
class Ran:
    """What came of a command."""

    status: int
    out: str
    err: str


def environment(settings: Config) -> dict[str, str]:
    """The environment that makes a process work on these settings."""
    return {
        **os.environ,
        "HVCTL_STORE": str(settings.store),
        "HVCTL_RUN": str(settings.run),
        "HVCTL_NETWORK": settings.network,
        "HVCTL_VM_URI": settings.vm_uri,
        "HVCTL_CONTAINER_URI": settings.container_uri,
    }


def run_bytes(
    settings: Config, *words: str, stdin: bytes = b"", as_user: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run hvctl; stdin and stdout as bytes."""
    return subprocess.run(
        [sys.executable, "-m", "hvctl", *words],
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
        env=environment(settings),
        user=as_user,
        group=as_user,
        extra_groups=[] if as_user is not None else None,
    )


def run(settings: Config, *words: str, stdin: str = "") -> Ran:
    """Run hvctl; everything as text."""
    done = run_bytes(settings, *words, stdin=stdin.encode())
    return Ran(status=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


def call(settings: Config, *words: str) -> Ran:
    """As `run`, in this process: a fifth of a second less, and what is imported already is not seen to be missing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(settings).items():
            patch.setenv(name, value)
        return call_here(*words)


def call_here(*words: str) -> Ran:
    """As `call`, on the settings that this process has."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run_command(App(), list(words))
    return Ran(status=status, out=out.getvalue(), err=err.getvalue())


def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Return when it holds; after half a minute the assertion behind it shall fail."""
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.05)
