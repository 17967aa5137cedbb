"""Runs of the tests on this machine: each has a store, a run directory and a network with its token in their names.

A run holds a lock with that token as long as it lives. So the next one knows which of the others was killed, and takes
away what that left: instances, mounts, networks, directories.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hvctl import gc, hostsetup
from hvctl.config import Config
from hvctl.errors import HvctlError
from hvctl.host import Host
from hvctl.hostsetup import directories
from hvctl.hostside import daemons, locks
from hvctl.instances import lifecycle

_FOLDER = Path("/var/lib")
_LOCK = re.compile(r"hvctl-test-([0-9a-f]{6})\.session")


@contextlib.contextmanager
def begin(token: str = "") -> Iterator[Config]:
    """Settings that only this run uses, for the block; their directories are removed afterwards."""
    token = token or secrets.token_hex(3)
    with locks.hold(_FOLDER / f"hvctl-test-{token}.session", timeout_s=0):
        settings = settings_of(token)
        yield settings
        _remove_directories(settings)


def settings_of(token: str) -> Config:
    return Config(store=_FOLDER / f"hvctl-test-{token}", run=Path(f"/run/hvctl-test-{token}"), network=f"hvtest{token}")


def small_store(settings: Config) -> Path:
    """Where a run may mount a small file system for another store of its own."""
    return settings.store.with_name(f"{settings.store.name}-small")


def collect() -> list[str]:
    """Take away what runs left that were killed; their tokens. What cannot be taken away is warned of, and stays known."""
    found = []
    for path in sorted(_FOLDER.iterdir()):
        name = _LOCK.fullmatch(path.name)
        if name is None:
            continue
        try:
            with locks.hold(path, timeout_s=0):
                _remove(settings_of(name[1]))
                found.append(name[1])
        except BlockingIOError:  # it lives
            continue
        except (HvctlError, OSError, subprocess.SubprocessError) as error:
            path.touch()
            told = f"a run of the tests that was killed left {path.with_suffix('')}* and guests of that store: {error}"
            warnings.warn(f"{told}; see virsh list --all, /proc/mounts", stacklevel=1)
    return found


def _remove(settings: Config) -> None:
    stores = [store for store in (settings.store, small_store(settings)) if store.is_dir()]
    for store in stores:
        with Host(replace(settings, store=store)) as host:
            for change in directories.missing(host):  # a reboot has emptied what was in memory
                change.apply()
            gc.collect(host)
            for instance in host.instances():
                lifecycle.stop(host, instance.name, force=True)
            _unmount_below(store)
            for instance in host.instances():
                lifecycle.delete(host, instance.name)
    with Host(settings) as host:
        hostsetup.teardown(host)
    _unmount_below(_FOLDER / settings.store.name)
    _remove_directories(settings)


def _unmount_below(store: Path) -> None:
    """File systems that tests have put over parts of a store, here and where libvirtd sees them."""
    for process in ("self", str(daemons.find_running("libvirtd") or "self")):
        mounted = [line.split(" ")[1] for line in Path(f"/proc/{process}/mounts").read_text().splitlines()]
        for path in reversed([path for path in mounted if path.startswith(f"{store}/")]):
            enter = [] if process == "self" else ["nsenter", "--mount", "--target", process]
            subprocess.run([*enter, "umount", "--lazy", path], check=True, capture_output=True, timeout=30)


def _remove_directories(settings: Config) -> None:
    small = small_store(settings)
    if small.is_mount():
        subprocess.run(["umount", "--lazy", str(small)], check=True, capture_output=True, timeout=30)
    for path in (settings.store, small, settings.run):
        shutil.rmtree(path, ignore_errors=True)
