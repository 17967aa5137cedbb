"""Snapshots and copies of real guests, running ones too. Both modes."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator

import pytest

from hvctl import gc
from hvctl.config import Config
from hvctl.errors import WrongState
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.instances import lifecycle, query, snapshots
from hvctl.instances.snapshots import Take
from hvctl.instances.verbs import TAKE
from hvctl.model import Consistency, Instance, Mode, State
from hvctl.units import GIB
from tests import victims, world
from tests.cli import run
from tests.test_guest import make
from tests.test_snapshots import deepen

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def subject(host: Host, mode: Mode, debian_image: str) -> Iterator[Instance]:
    """A running guest that the tests of this module change one after another."""
    instance = make(host, "subject", mode, debian_image)
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


def test_a_guest_whose_snapshot_is_killed_goes_on(
    host: Host, settings: Config, mode: Mode, debian_image: str, subject: Instance
) -> None:
    """At every step, the ones in which it is held still among them; `gc` lets it go on."""
    for step in TAKE.step_names():
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
    lifecycle.stop(host, "subject")
    lifecycle.start(host, "subject")
    assert inside(settings, "subject", "cat /root/step") == before


@pytest.mark.only_mode(Mode.VM, "a container has no agent")
def test_a_vm_without_an_answering_agent_gets_a_crash_consistent_snapshot(
    host: Host, settings: Config, mode: Mode, subject: Instance
) -> None:
    control = "systemctl kill --signal={} qemu-guest-agent"
    assert run(settings, "ssh", "subject", "--", control.format("STOP")).status == 0
    taken = run(settings, "snapshot", "take", "subject", "mute", "--json")
    assert (taken.status, json.loads(taken.out)["consistency"]) == (0, "crash-consistent"), taken.err
    told = run(settings, "snapshot", "take", "subject", "mute2")
    assert "crash-consistent: the guest agent" in told.err
    assert run(settings, "ssh", "subject", "--", control.format("CONT")).status == 0
    inside(settings, "subject", "touch /root/not-frozen; sync")


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


@pytest.mark.only_mode(Mode.VM, "a container's memory cannot be kept")
def test_a_vm_goes_on_in_the_moment_that_was_kept(host: Host, settings: Config, mode: Mode, debian_image: str) -> None:
    other = query.find(host, "twin")
    alive = other.record if other else None
    before = world.look(host, alive=alive)
    make(host, "moment", mode, debian_image)
    try:
        inside(settings, "moment", "echo one > /dev/shm/memory; echo one > /root/disk; sync")
        taken = snapshots.take(host, "moment", Take(name="then", with_memory=True))
        assert taken.consistency is Consistency.MEMORY
        boot = inside(settings, "moment", "cat /proc/sys/kernel/random/boot_id")
        inside(settings, "moment", "echo two > /dev/shm/memory; echo two > /root/disk; sync")
        with pytest.raises(WrongState):
            snapshots.revert(host, "moment", "then")
        assert snapshots.revert(host, "moment", "then", force=True) is True
        found = inside(settings, "moment", "cat /dev/shm/memory /root/disk /proc/sys/kernel/random/boot_id; date +%s")
        *content, clock = found.split()
        assert content == ["one", "one", boot]
        assert abs(int(clock) - time.time()) < 30
        assert run(settings, "ssh", "moment", "--", "true").status == 0
        lifecycle.stop(host, "moment")
    finally:
        lifecycle.delete(host, "moment")
    assert world.differences(before, world.look(host, alive=alive)) == []


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
