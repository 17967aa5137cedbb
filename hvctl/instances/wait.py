"""Waiting for a guest in named stages: boot, network, ssh (or agent); on a timeout, which one, why, and the console."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from hvctl.access.banner import Reach, probe
from hvctl.backends import get_backend, processes
from hvctl.errors import GuestFailed, HvctlError, Interrupted, TimedOut
from hvctl.events import Sink, Stage
from hvctl.host import Host
from hvctl.instances import query
from hvctl.libvirtapi import domains
from hvctl.model import Instance, Provision, State, Wait

DEFAULT_TIMEOUT_S = 180.0
_POLL_S = 0.02
_CONSOLE_LINES = 20

_WHY = {
    "boot": "it wrote nothing to its serial console, and its address does not answer",
    "network": "its address does not answer",
    "ssh": "the network answers, but sshd does not",
    "agent": "no command can be run inside yet",
    "process": "its init has not started its process yet",
}


def wait_until(
    host: Host, instance: Instance, goal: Wait, *, timeout_s: float, events: Sink, log_start: int = 0
) -> None:
    """Return when the guest has come as far as `goal`.

    `log_start`: what the backend's `measure_log` gave before this start. Raises TimedOut, or GuestFailed when it powers off or
    pauses meanwhile; the message names the stage and shows the console.
    """
    if goal in (Wait.NONE, Wait.RUNNING):
        return
    deadline_s = time.monotonic() + timeout_s
    domain = domains.get(host.connection(instance.record.mode), instance.record.uuid)
    stages = _choose_stages(host, instance, goal, log_start)
    current, checked_s = "", time.monotonic()
    for stage in stages:
        if stage != current:
            current = stage
            events(Stage(instance.name, stage))
        now_s = time.monotonic()
        if now_s >= deadline_s:
            raise _timed_out(host, instance, stage, timeout_s, log_start)
        if now_s - checked_s > 1:
            checked_s = now_s
            if not domains.is_running(domain):
                raise _went_off(host, instance, stage, log_start)
        host.pause(_POLL_S)


def for_what_stays(name: str) -> contextlib.AbstractContextManager[None]:
    """A wait that leaves the instance as it is when the user has enough of it: Interrupted, which says so."""
    return _saying(f"{name!r}, which is there and runs", f"hvctl start {name}")


def for_what_goes_off(name: str) -> contextlib.AbstractContextManager[None]:
    """A wait for one that was asked to power off: it does not take that back when the user has enough of it."""
    return _saying(f"{name!r}, which was asked to shut down and goes on with it", f"hvctl stop {name}")


@contextlib.contextmanager
def _saying(whom: str, again: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(f"interrupted while waiting for {whom}", hint=f"wait on: {again}") from error


def _choose_stages(host: Host, instance: Instance, goal: Wait, log_start: int) -> Iterator[str]:
    record = instance.record
    if record.is_application:
        return _process_stages(host, instance)
    if goal is Wait.SSH and record.provision is Provision.NONE:
        return _boot_stages(host, instance, log_start)  # it has no key of ours, perhaps no sshd, and may have no agent
    if goal is Wait.AGENT or not record.address:  # on no network of ours: nobody can knock, but a command can be run
        return _agent_stages(host, instance)
    return _ssh_stages(host, instance, log_start)


def _boot_stages(host: Host, instance: Instance, log_start: int) -> Iterator[str]:
    while not get_backend(instance.record.mode).is_up(host, instance.record, log_start=log_start):
        yield "boot"


def _ssh_stages(host: Host, instance: Instance, log_start: int) -> Iterator[str]:
    """The stage it is in, again and again, until sshd has sent its banner."""
    backend, has_booted = get_backend(instance.record.mode), False
    while True:
        reach = probe(query.endpoint_of(instance))
        if reach is Reach.BANNER:
            return
        has_booted = (
            has_booted or reach is not Reach.NOTHING or backend.has_booted(host, instance.record, log_start=log_start)
        )
        if reach is Reach.NOTHING:
            yield "network" if has_booted else "boot"
        else:
            yield "ssh"


def _agent_stages(host: Host, instance: Instance) -> Iterator[str]:
    while not get_backend(instance.record.mode).answers(host, instance.record):
        yield "agent"


def _process_stages(host: Host, instance: Instance) -> Iterator[str]:
    """Until an application's process runs, or has ended well. Raises GuestFailed when it has failed already."""
    while not (status := processes.read_status(host, instance.record)).has_started:
        yield "process"
    if status.exit_code:
        message = f"the process of {instance.name!r} ended at once, with code {status.exit_code}"
        raise GuestFailed(_with_console(host, instance, message, 0), hint=f"hvctl logs {instance.name}")


def _timed_out(host: Host, instance: Instance, stage: str, timeout_s: float, log_start: int) -> HvctlError:
    if not domains.is_running(domains.get(host.connection(instance.record.mode), instance.record.uuid)):
        return _went_off(host, instance, stage, log_start)
    message = f"{instance.name!r} did not come up within {timeout_s:g} s: stuck at {stage!r}, {_WHY[stage]}"
    if stage == "network":
        message += f" ({_describe_addresses(host, instance)})"
    return TimedOut(
        _with_console(host, instance, message, log_start),
        hint=f"it is still running; look at it: hvctl console {instance.name}",
    )


def _describe_addresses(host: Host, instance: Instance) -> str:
    """What a guest that nobody reaches knows of its own addresses."""
    try:
        result = get_backend(instance.record.mode).run_inside(host, instance.record, ("hostname", "-I"), b"")
    except HvctlError as error:
        return f"nor can it be asked: {error}"
    found = result.stdout.decode(errors="replace").split()
    return f"inside it has {', '.join(found) or 'no address'}; {instance.record.address} was given to it"


def _went_off(host: Host, instance: Instance, stage: str, log_start: int) -> GuestFailed:
    now = query.get(host, instance.name)
    if now.state is State.PAUSED:
        because = f" ({now.live.cause})" if now.live.cause else ""
        message, hint = (
            f"{instance.name!r} paused{because} while waiting for {stage!r}",
            f"hvctl resume {instance.name}",
        )
    else:
        message, hint = f"{instance.name!r} powered off while waiting for {stage!r}", f"hvctl logs {instance.name}"
    return GuestFailed(_with_console(host, instance, message, log_start), hint=hint)


def _with_console(host: Host, instance: Instance, message: str, log_start: int) -> str:
    """The message and the last lines of this boot's log."""
    try:
        lines = query.read_console(host, instance, lines=_CONSOLE_LINES, start=log_start)
    except HvctlError as error:
        return f"{message} (its log cannot be read: {error.message})"
    return "\n".join([message, *lines]) if lines else f"{message} (no console output)"
