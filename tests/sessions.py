"""Runs of the tests on this machine: each has a store, a run directory and a network with its token in their names.

A run holds a lock with that token as long as it lives. So the next one knows which of the others was killed, and takes
away what that left: instances, mounts, networks, directories. What a run in a world of its own (scripts/apart) has left
went with that world, but for directories; its file says in which it was.
"""

from __future__ import annotations

import contextlib
import os
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
_FIRST_PIDS = "pid:[4026531836]"  # PROC_PID_INIT_INO, linux/proc_ns.h
_LOCK = re.compile(r"hvctl-test-([0-9a-f]{6})\.session")


@contextlib.contextmanager
def begin(token: str = "") -> Iterator[Config]:
    """Settings that only this run uses, for the block; their directories are removed afterwards."""
    token = token or secrets.token_hex(3)
    path = _FOLDER / f"hvctl-test-{token}.session"
    with locks.hold(path, timeout_s=0):
        path.write_text(_world())
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
        world = path.read_text() if path.exists() else _world()
        if world != _world() and not _is_gone(world):
            continue
        try:
            with locks.hold(path, timeout_s=0):
                _remove(settings_of(name[1]), has_guests=world == _world())
                found.append(name[1])
        except BlockingIOError:  # it lives
            continue
        except (HvctlError, OSError, subprocess.SubprocessError) as error:
            path.write_text(world)
            told = f"a run of the tests that was killed left {path.with_suffix('')}* and guests of that store: {error}"
            warnings.warn(f"{told}; see virsh list --all, /proc/mounts", stacklevel=1)
    return found


def _world() -> str:
    return os.readlink("/proc/self/ns/net")


def _is_gone(world: str) -> bool:
    """Whether nobody is there any more, as far as we see: all processes are in the first pid namespace alone."""
    if os.readlink("/proc/self/ns/pid") != _FIRST_PIDS:
        return False
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == world:
                return False
    return True


def _remove(settings: Config, *, has_guests: bool) -> None:
    for store in (settings.store, small_store(settings)):
        if not has_guests or not store.is_dir():
            continue
        with Host(replace(settings, store=store)) as host:
            for change in directories.missing(host):  # a reboot has emptied what was in memory
                change.apply()
            gc.collect(host)
            for instance in host.instances():
                lifecycle.stop(host, instance.name, force=True)
            _unmount_below(store)
            for instance in host.instances():
                lifecycle.delete(host, instance.name)
    if has_guests:
        with Host(settings) as host:
            hostsetup.teardown(host)
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
