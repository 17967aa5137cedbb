"""Snapshots and copies of real guests, running ones too. Both modes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import gc
from hvctl.config import Config
from hvctl.errors import HvctlError, WrongState
from hvctl.events import Event, Sink, StepStarted
from hvctl.host import Host
from hvctl.instances import lifecycle, query, snapshots
from hvctl.instances.snapshots import Take
from hvctl.instances.verbs import TAKE
from hvctl.libvirtapi import domains
from hvctl.model import Consistency, Instance, Mode, Record, State, Wait
from hvctl.units import GIB
from tests import campaign, victims
from tests.cli import run, wait_for
from tests.test_guest import make
from tests.test_snapshots import deepen

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def subject(host: Host, mode: Mode, debian_image: str) -> Iterator[Instance]:
    """A running guest that the tests of this module change one after another."""
    instance = make(host, "subject", mode, debian_image, wait=Wait.AGENT)
    yield instance
    for name in ("subject", "twin"):
        if query.find(host, name) is not None:
            lifecycle.delete(host, name)


def inside(settings: Config, name: str, command: str) -> str:
    done = run(settings, "exec", name, "--", "sh", "-c", command)
    assert done.status == 0, done.err
    return done.out.strip()


def test_a_running_guest_goes_back_to_what_it_was(host: Host, settings: Config, mode: Mode, subject: Instance) -> None:
    token = secrets.token_hex(8)
    inside(settings, "subject", f"echo {token} > /root/token; rm -f /etc/motd; mkdir /root/new; ln -s token /root/link")
    taken = run(settings, "snapshot", "take", "subject", "before", "--comment", "all well", "--json")
    assert taken.status == 0, taken.err
    assert json.loads(taken.out)["consistency"] == "frozen"
    assert query.get(host, "subject").state is State.RUNNING
    inside(settings, "subject", "echo lost > /root/token; touch /root/since; rmdir /root/new; echo back > /etc/motd")
    snapshots.take(host, "subject", Take(name="after"))

    refused = run(settings, "snapshot", "revert", "subject", "before", "--yes")
    assert (refused.status, "running" in refused.err) == (5, True)
    done = run(settings, "snapshot", "revert", "subject", "before", "--yes", "--force")
    assert done.status == 0, done.err  # and sshd answers with the key that is pinned
    found = run(settings, "ssh", "subject", "--", "cat /root/link; ls /root; test ! -e /etc/motd")
    assert (found.status, found.out) == (0, f"{token}\nlink\nnew\ntoken\n")
    names = [line.split()[1] for line in run(settings, "snapshot", "list", "subject").out.splitlines()[1:]]
    assert names == ["before*", "after"]


def _take(host: Host, name: str, events: Sink) -> object:
    return snapshots.take(host, name, Take(name="killed"), events)


HELD = ("freeze", "fill", "switch", "thaw", "define")
"""The steps in which a guest is held still or changes its layer."""


@pytest.mark.parametrize("steps", [HELD, pytest.param(TAKE.step_names(), marks=pytest.mark.long)], ids=["held", "all"])
def test_a_guest_whose_snapshot_is_killed_goes_on(
    host: Host, settings: Config, mode: Mode, subject: Instance, steps: tuple[str, ...]
) -> None:
    """`gc` lets it go on."""
    for step in steps:
        token = secrets.token_hex(4)
        inside(settings, "subject", f"echo {token} > /root/step")
        victims.die_at(settings, _take, TAKE.name, step, "subject")
        gc.collect(host)
        instance = query.get(host, "subject")
        assert (instance.state, instance.record.pending) == (State.RUNNING, None), step
        assert inside(settings, "subject", "echo goes on >> /root/step; sync; head -1 /root/step") == token
        for item in instance.record.snapshots:
            if item.name == "killed":
                snapshots.delete(host, "subject", "killed")
        assert gc.collect(host) == ()
    before = inside(settings, "subject", "cat /root/step")
    lifecycle.stop(host, "subject", force=True)
    lifecycle.start(host, "subject", goal=Wait.AGENT)
    assert inside(settings, "subject", "cat /root/step") == before


@pytest.mark.long
@pytest.mark.parametrize("step", HELD)
def test_a_guest_that_dies_under_its_snapshot_comes_back(
    host: Host, settings: Config, mode: Mode, subject: Instance, step: str
) -> None:
    """Its qemu, or its controller, killed with -9 where it is held still."""
    token = secrets.token_hex(8)
    inside(settings, "subject", f"echo {token} > /root/died; sync")

    def kill(event: Event) -> None:
        if isinstance(event, StepStarted) and (event.verb, event.step) == (TAKE.name, step):
            os.kill(process_of(host, query.get(host, "subject").record), signal.SIGKILL)

    with campaign.tally.counting("guest killed", f"{mode}-{step}"):
        with contextlib.suppress(HvctlError):
            snapshots.take(host, "subject", Take(name="died"), kill)
        wait_for(lambda: query.get(host, "subject").live.state not in (State.RUNNING, State.PAUSED))
        assert query.get(host, "subject").live.state not in (State.RUNNING, State.PAUSED)
        assert all(item.is_done for item in gc.collect(host))
        lifecycle.start(host, "subject")
        assert inside(settings, "subject", "cat /root/died") == token
        if any(item.name == "died" for item in query.get(host, "subject").record.snapshots):
            snapshots.delete(host, "subject", "died")
        assert gc.collect(host) == ()


def process_of(host: Host, record: Record) -> int:
    """The process that is an instance: a VM's qemu, a container's controller."""
    if record.mode is Mode.VM:
        return int(Path(f"/run/libvirt/qemu/{record.name}.pid").read_text())
    return domains.get_number(domains.get(host.connection(record.mode), record.uuid))


@pytest.mark.only_mode(Mode.VM, "a container has no agent")
def test_a_vm_without_an_answering_agent_gets_a_crash_consistent_snapshot(
    host: Host, settings: Config, mode: Mode, subject: Instance
) -> None:
    control = "systemctl kill --signal={} qemu-guest-agent"
    assert run(settings, "ssh", "subject", "--", control.format("STOP")).status == 0
    taken = run(settings, "snapshot", "take", "subject", "mute")
    assert (taken.status, "crash-consistent: the guest agent" in taken.err) == (0, True), taken.err
    listed = json.loads(run(settings, "snapshot", "list", "subject", "--json").out)
    assert [item["consistency"] for item in listed if item["name"] == "mute"] == ["crash-consistent"]
    assert run(settings, "ssh", "subject", "--", control.format("CONT")).status == 0
    inside(settings, "subject", "touch /root/not-frozen; sync")


@pytest.mark.only_mode(Mode.VM, "a container's memory cannot be kept")
def test_a_vm_goes_on_in_the_moment_that_was_kept(host: Host, settings: Config, mode: Mode, subject: Instance) -> None:
    inside(settings, "subject", "echo one > /dev/shm/memory; echo one > /root/disk; sync")
    taken = snapshots.take(host, "subject", Take(name="then", with_memory=True))
    assert taken.consistency is Consistency.MEMORY
    boot = inside(settings, "subject", "cat /proc/sys/kernel/random/boot_id")
    inside(settings, "subject", "echo two > /dev/shm/memory; echo two > /root/disk; sync")
    with pytest.raises(WrongState):
        snapshots.revert(host, "subject", "then")
    assert snapshots.revert(host, "subject", "then", force=True) is True
    found = inside(settings, "subject", "cat /dev/shm/memory /root/disk /proc/sys/kernel/random/boot_id; date +%s")
    *content, clock = found.split()
    assert content == ["one", "one", boot]
    assert abs(int(clock) - time.time()) < 30
    assert run(settings, "ssh", "subject", "--", "true").status == 0
    snapshots.delete(host, "subject", "then")
    assert list(host.store.root.rglob("memory.save")) == []
    assert gc.collect(host) == ()


def test_a_copy_of_a_running_guest_is_another_machine(host: Host, settings: Config, subject: Instance) -> None:
    """And survives the deletion of its source."""
    inside(settings, "subject", "echo shared > /root/shared; install -o 1000 -g 2000 /dev/null /root/owned; sync")
    facts = "cat /etc/machine-id; hostname; hostname -I"
    record = query.get(host, "subject").record
    assert inside(settings, "subject", facts).split() == [record.uuid.hex, "subject", record.address]
    done = run(settings, "copy", "subject", "twin", "--no-start")
    assert done.status == 0, done.err
    twin = query.get(host, "twin").record
    for field in ("uuid", "mac", "address", "host_key"):
        assert getattr(twin, field) != getattr(record, field)
    assert query.get(host, "subject").record.snapshots == record.snapshots
    lifecycle.delete(host, "subject")

    done = run(settings, "start", "twin")
    assert done.status == 0, done.err
    assert run(settings, "ssh", "twin", "--", facts).out.split() == [twin.uuid.hex, "twin", twin.address]
    owners = "cat /root/shared; stat -c %u:%g /root/owned; echo more > /root/owned; stat -c %u:%g /root/owned"
    assert inside(settings, "twin", owners).split() == ["shared", "1000:2000", "1000:2000"]


@pytest.mark.long
def test_a_guest_stands_on_a_hundred_snapshots(host: Host, settings: Config, mode: Mode, debian_image: str) -> None:
    make(host, "deep", mode, debian_image, start=False)
    try:
        deepen(host, "deep", 100, offset_bytes=9 * GIB)  # where its file system has nothing
        assert len(query.get(host, "deep").record.layers) == 101
        assert run(settings, "start", "deep").status == 0
        assert run(settings, "ssh", "deep", "--", "echo written > /root/file; sync; hostname").out == "deep\n"
        lifecycle.stop(host, "deep")
        snapshots.revert(host, "deep", "s99")
        assert run(settings, "start", "deep").status == 0
        assert run(settings, "ssh", "deep", "--", "ls /root").out == ""
    finally:
        lifecycle.delete(host, "deep")
