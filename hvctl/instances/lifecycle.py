"""Starting, stopping, pausing and deleting."""

from __future__ import annotations

import functools
from dataclasses import replace

from hvctl import operation
from hvctl.backends import get_backend
from hvctl.errors import NotFound, TimedOut, WrongState
from hvctl.events import Sink, Stage, StepStarted, ignore
from hvctl.host import Host
from hvctl.instances import effects, query, wait
from hvctl.instances.claim import claim_existing
from hvctl.instances.recovery import get_settled
from hvctl.instances.verbs import DELETE
from hvctl.libvirtapi import domains, networks
from hvctl.model import Instance, Record, State, Wait
from hvctl.operation import CLAIM

STOP_TIMEOUT_S = 60.0


def start(
    host: Host, name: str, *, goal: Wait = Wait.SSH, timeout_s: float = wait.DEFAULT_TIMEOUT_S, events: Sink = ignore
) -> bool:
    """Start and wait until the guest answers; False when it was running already.

    Raises NotFound, WrongState, TimedOut with the stage it is stuck at, Interrupted when somebody stops the waiting.
    """
    with host.lock(name):
        instance = query.get_complete(host, name)
        is_new = instance.state is not State.RUNNING
        if instance.state is State.PAUSED:
            raise WrongState(f"{name!r} is paused", hint=f"hvctl resume {name}")
        log_start = start_locked(host, instance.record, events) if is_new else 0
    with wait.for_what_stays(name):
        wait.wait_until(host, instance, goal, timeout_s=timeout_s, events=events, log_start=log_start)
    return is_new


def start_locked(host: Host, record: Record, events: Sink) -> int:
    """Start while the caller holds the lock; does not wait. One call of libvirt's: nothing is to be undone or finished.

    Returns where this boot begins in the boot log, for `wait_until`.
    """
    connection = host.connection(record.mode)
    events(StepStarted(record.name, "start", "network"))
    if record.network:
        networks.ensure_active(connection, record.network)
    events(StepStarted(record.name, "start", "start"))
    log_start = get_backend(record.mode).measure_log(host, record)
    domains.start(domains.get(connection, record.uuid))
    events(StepStarted(record.name, "start", "wait"))
    return log_start


def stop(
    host: Host, name: str, *, timeout_s: float = STOP_TIMEOUT_S, force: bool = False, events: Sink = ignore
) -> bool:
    """Ask the guest to power off and wait for it, or kill it with `force`; False when it was off already.

    Raises TimedOut with the guest still running.
    """
    with host.lock(name):
        instance = query.get_complete(host, name)
        if instance.state in (State.STOPPED, State.CRASHED):
            return False
        if force:
            effects.kill(host, instance.record)
            return True
        if instance.state is State.PAUSED:
            raise WrongState(f"{name!r} is paused and cannot shut down", hint=f"hvctl resume {name}, or stop --force")
        with wait.for_what_goes_off(name):
            stop_locked(host, instance, timeout_s=timeout_s, events=events)
        return True


def stop_locked(host: Host, instance: Instance, *, timeout_s: float = STOP_TIMEOUT_S, events: Sink = ignore) -> None:
    """Ask a running guest to power off and wait, while the caller holds the lock. Raises TimedOut, the guest running."""
    name, record = instance.name, instance.record
    connection = host.connection(record.mode)
    events(StepStarted(name, "stop", "shutdown"))
    events(Stage(name, "shutdown"))
    ask = functools.partial(get_backend(record.mode).ask_to_stop, host, record)
    try:
        domains.shut_down(connection, domains.get(connection, record.uuid), timeout_s=timeout_s, ask=ask)
    except TimedOut as error:
        error.hint = f"wait longer with --timeout, or: hvctl stop --force {name}"
        raise


def restart(
    host: Host,
    name: str,
    *,
    goal: Wait = Wait.SSH,
    timeout_s: float = wait.DEFAULT_TIMEOUT_S,
    force: bool = False,
    events: Sink = ignore,
) -> None:
    """Stop and start again; a stopped one is just started. The definition of the next start takes effect."""
    stop(host, name, force=force, events=events)
    start(host, name, goal=goal, timeout_s=timeout_s, events=events)


def pause(host: Host, name: str) -> bool:
    """Freeze in memory; False when it was paused already."""
    with host.lock(name):
        instance = query.get_complete(host, name)
        if instance.state is State.PAUSED:
            return False
        if instance.state is not State.RUNNING:
            raise WrongState(f"{name!r} is {instance.state}", hint=f"hvctl start {name}")
        get_backend(instance.record.mode).pause(host, instance.record)
        return True


def resume(host: Host, name: str) -> bool:
    """Let a paused instance go on; False when it was running.

    Raises WrongState, with the cause, when it pauses again at once (a disk that is still full).
    """
    with host.lock(name):
        instance = query.get_complete(host, name)
        if instance.state is State.RUNNING:
            return False
        if instance.state is not State.PAUSED:
            raise WrongState(f"{name!r} is {instance.state}, not paused", hint=f"hvctl start {name}")
        get_backend(instance.record.mode).resume(host, instance.record)
        return True


def delete(host: Host, name: str, events: Sink = ignore, *, keep_volumes: bool = False) -> None:
    """Delete an instance, running or not, with everything that its record says is its own, and nothing else.

    `keep_volumes`: its data volumes stay, as volumes that nobody has.

    From the first effect on it can only be finished: the same command, or `hvctl gc`, goes on where a crash stopped it.
    """
    host.require_root("delete")
    with host.lock(name):
        query.get(host, name)
        try:
            instance = get_settled(host, name)
        except NotFound:  # it was half made, or half deleted: settling it took the rest away
            return
        _delete_locked(host, instance.record, events, keep_volumes=keep_volumes)


def _delete_locked(host: Host, record: Record, events: Sink, *, keep_volumes: bool) -> None:
    record = replace(record, pending=operation.intend(DELETE, keep="yes" if keep_volumes else "no"))
    with operation.begin(host, DELETE, record, claim_existing(host), events) as change:
        change.redo_after(CLAIM)
