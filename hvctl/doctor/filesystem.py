"""What the store's file system can do: tried in a private directory on it, not guessed from its name."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from hvctl.backends import rootlimits
from hvctl.doctor.finding import Outcome, check, failed, not_applicable, ok, warning
from hvctl.host import Host
from hvctl.hostside import files, machine, trials

_MOVE = 'move the store to ext4, xfs or btrfs: set store = "..." in /etc/hvctl/config.toml'


@check("publishing", is_vital=True)
def publishing(host: Host) -> Outcome:
    """A finished image or layer appears whole and never over another: renameat2, fsync."""
    problem = try_on_store(host, trials.try_publishing)
    return _outcome(host, problem, "renameat2(NOREPLACE) and fsync work", is_needed=True)


@check("unnamed files")
def unnamed_files(host: Host) -> Outcome:
    """A file can be written before it has a name: O_TMPFILE."""
    return _outcome(host, try_on_store(host, trials.try_unnamed_files), "O_TMPFILE works")


@check("extended attributes")
def attributes(host: Host) -> Outcome:
    """User and trusted attributes are kept: container layers and capabilities of files need them."""
    return _outcome(host, try_on_store(host, trials.try_attributes), "user and trusted attributes are kept")


@check("overlay")
def overlay(host: Host) -> Outcome:
    """A container's writable layer can lie here: overlayfs takes it as its upper directory."""
    return _outcome(host, try_on_store(host, trials.try_overlay), "overlayfs can write its upper directory here")


@check("idmapped mounts")
def idmapped(host: Host) -> Outcome:
    """An image's tree can be shown with shifted owners: unprivileged containers share it that way."""
    return _outcome(host, try_on_store(host, trials.try_idmapped), "owners can be shifted by a mount")


@check("reflink")
def reflink(host: Host) -> Outcome:
    """Copies can share their blocks; without it copies of running containers take the time and space of their data."""
    problem = try_on_store(host, trials.try_reflink)
    if problem == "Operation not supported":
        return ok("not there (btrfs and xfs have it): copies of whole files take their full size")
    return _outcome(host, problem, "copies share their blocks")


@check("project quotas")
def project_quotas(host: Host) -> Outcome:
    """What a container may write to its root can be limited (create --container --disk)."""
    if os.geteuid() != 0 or not host.shell.call(files.exists, host.store.layers):
        return not_applicable("only root can look, in a store that is set up")
    obstacle = rootlimits.find_obstacle(host)
    if obstacle:
        return ok(f"not there, so roots of containers have no size: {obstacle}")
    return ok("roots of containers can have a size")


def try_on_store(host: Host, trial: Callable[[Path], str]) -> str | None:
    """What a trial says, in a private directory on the store's file system; None when this user may not try."""
    if os.geteuid() != 0:
        return None
    with _ground(host) as directory:
        return host.shell.call(trial, directory)


@contextlib.contextmanager
def _ground(host: Host) -> Iterator[Path]:
    """A private directory, removed at the end: where operations build, or before setup beside the store to be."""
    name = f"doctor-{secrets.token_hex(4)}"
    building, locks = host.store.building, host.store.locks
    with contextlib.ExitStack() as stack:
        if host.shell.call(files.exists, building) and host.shell.call(files.exists, locks):
            stack.enter_context(
                host.lock(f"building-{name}")
            )  # `hvctl gc` leaves it alone, or removes what a crash left
            directory = building / name
        else:
            directory = host.shell.call(machine.find_nearest, host.store.root) / f".hvctl-{name}"
        host.shell.call(files.make_directory, directory, 0o700)
        stack.callback(host.shell.call, files.remove, directory)
        yield directory


def _outcome(host: Host, problem: str | None, works: str, *, is_needed: bool = False) -> Outcome:
    if problem is None:
        return not_applicable("only root can try it")
    if not problem:
        return ok(works)
    refuse = failed if is_needed else warning
    return refuse(f"does not work in {str(host.store.root)!r}: {problem}", fix=_MOVE)
