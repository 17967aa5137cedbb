"""The fault campaign: every fault at every registered step of every verb, and what must hold after each.

A `Stage` is an instance that was made ready for a verb; `strike` does one fault to the verb on it and then looks:

- whatever was changed is visibly incomplete, or complete;
- what is not the instance's own is as it was, by content;
- `gc`, or the same command again, leaves the verb done, or everything as it was before;
- the store's copy of each definition is libvirt's;
- nothing is pending then, and another `gc` finds nothing to do (so nobody's files are there, either).

An instance that is as before serves the next fault. The store lies on a small file system of its own: a full disk is
made by shrinking it. `tally` counts; its sums are printed at the end of the run (conftest.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import itertools
import os
import random
import secrets
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hvctl import gc, metadata
from hvctl.config import Config
from hvctl.errors import HostError, HvctlError
from hvctl.events import Event, Sink, StepStarted, ignore
from hvctl.host import Host
from hvctl.hostsetup import daemons, directories
from hvctl.hostside.daemons import find_running
from hvctl.instances import lifecycle, query
from hvctl.model import Mode, Record, State
from tests import sessions, tiny, victims, world
from tests.scenarios import POINTS, SCENARIOS, UNSUPPORTED, Scenario, make_instance


class Fault(enum.StrEnum):
    """What befalls a verb at the beginning of a step, the intent of which is written already."""

    KILL = "kill"
    """-9; then `gc`."""
    KILL_AGAIN = "kill-again"
    """-9; then the same command again."""
    CTRL_C = "ctrl-c"
    ERROR = "error"
    """An error that is raised."""
    FULL = "full-disk"
    """No block is free from here on, for hvctl nor for what it starts."""
    NO_INODES = "no-inodes"
    """No file can be made from here on."""
    LIBVIRTD = "libvirtd"
    """libvirtd is killed."""


@dataclass(frozen=True)
class Injection:
    """One fault at one step of one verb."""

    mode: Mode
    verb: str
    step: str
    fault: Fault
    is_daily: bool

    def __str__(self) -> str:
        return f"{self.mode}-{self.verb}-{self.step}-{self.fault}"


_KILLS = (Fault.KILL, Fault.KILL_AGAIN)
_OTHERS = (Fault.CTRL_C, Fault.FULL, Fault.ERROR, Fault.NO_INODES)


def plan() -> list[Injection]:
    """All of them, those of one stage one after another.

    Daily are two at each step: -9 in one mode and another fault in the other, modes and faults taking turns.
    """
    found = []
    for mode in Mode:
        for number, (verb, step) in enumerate(POINTS):
            if (verb, mode) in UNSUPPORTED:
                continue
            is_alone = any(name == verb for name, _mode in UNSUPPORTED)
            turn = number // 2
            is_killed = (number % 2 == 0) == (mode is Mode.VM)
            daily = {_KILLS[turn % 2]} if is_killed or is_alone else set()
            daily |= {_OTHERS[turn % 4]} if not is_killed or is_alone else set()
            found += [Injection(mode, verb, step, fault, fault in daily) for fault in Fault]
    return found


@dataclass
class Tally:
    """What was done and found in this run."""

    injections: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def counting(self, kind: str, what: object) -> Iterator[None]:
        """Count an injection, and a violation when the block fails."""
        self.injections[kind] += 1
        try:
            yield
        except BaseException as error:
            self.violations.append(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            raise

    def lines(self) -> list[str]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.injections.most_common())
        head = f"{self.injections.total()} injections ({kinds}), {len(self.violations)} violations"
        return [*([head] if self.injections else []), *self.violations, *self.notes]


tally = Tally()


_SEED = os.environ.get("HVCTL_TEST_SEED")


def dice(what: str) -> random.Random:
    """Chance from a seed that is printed at the end of the run; HVCTL_TEST_SEED names one to do again."""
    seed = int(_SEED) if _SEED else secrets.randbits(32)
    tally.notes.append(f"{what}: seed {seed}")
    return random.Random(seed)


class SmallDisk:
    """A file system in memory for a store, which can be full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        path.mkdir(mode=0o711)
        self._mount(0, "mode=711,size=1g,nr_inodes=100000")

    def fill(self, fault: Fault) -> None:
        facts = os.statvfs(self._path)
        used = {
            Fault.FULL: f"size={(facts.f_blocks - facts.f_bfree) * facts.f_frsize}",
            Fault.NO_INODES: f"nr_inodes={facts.f_files - facts.f_ffree}",
        }
        self._mount(32, used[fault])  # MS_REMOUNT

    def free(self) -> None:
        self._mount(32, "size=1g,nr_inodes=100000")

    def remove(self) -> None:
        self._libc.umount2(os.fsencode(self._path), 2)  # MNT_DETACH
        self._path.rmdir()

    def _mount(self, flags: int, options: str) -> None:
        target = os.fsencode(self._path)
        done = self._libc.mount(b"tmpfs", target, b"tmpfs", flags, options.encode())
        assert done == 0, f"{options}: {os.strerror(ctypes.get_errno())}"


@contextlib.contextmanager
def prepared(settings: Config) -> Iterator[tuple[Host, SmallDisk]]:
    """A host with a store of its own, the tiny image in it, and of each mode an instance that nothing must befall."""
    store = sessions.small_store(settings)
    disk = SmallDisk(store)
    try:
        with Host(replace(settings, store=store)) as host:
            for change in directories.missing(host):
                change.apply()
            tiny.publish(host, "tiny")
            tiny.publish_root(host, "tiny-root")
            try:
                for mode in Mode:
                    name = f"bystander-{secrets.token_hex(3)}"
                    make_instance(host, mode, name)
                    SCENARIOS["snapshot-delete"].prepare(host, name)
                yield host, disk
            finally:
                for instance in host.instances():
                    lifecycle.delete(host, instance.name)
    finally:
        disk.remove()


class Stage:
    """An instance that is ready for a verb."""

    def __init__(self, host: Host, mode: Mode, verb: str, empty: world.World) -> None:
        self.host, self.mode, self.verb = host, mode, verb
        self.scenario: Scenario = SCENARIOS[verb]
        self.name = f"crash-{secrets.token_hex(3)}"
        self.empty = empty
        """The world without it."""
        self.own: set[str] = {self.name}
        if self.scenario.needs_instance:
            make_instance(host, mode, self.name, image=self.scenario.image)
            self.scenario.prepare(host, self.name)
            self.own |= _names_of(query.get(host, self.name).record)
        self.before = self.now = world.look(host)

    @property
    def deed(self) -> victims.Deed:
        """The verb, for another process."""
        return functools.partial(_act, self.verb, self.mode)

    def act(self, events: Sink = ignore) -> object:
        return self.scenario.act(self.host, self.mode, self.name, events)

    def is_done(self) -> bool:
        return self.scenario.is_done(self.host, self.name)

    def look(self) -> list[str]:
        """Take a look, and tell what is not as it was before the fault. What is not its own must be."""
        self.now = world.look(self.host)
        changed = world.differences(self.before, self.now)
        others = [line for line in changed if ": gone: " in line and not any(word in line for word in self.own)]
        assert others == []
        return changed

    def clear(self) -> None:
        """Delete whatever stands under its name; then the world must be as it was without it."""
        for name in (self.name, f"{self.name}-new"):
            if query.find(self.host, name) is not None:
                lifecycle.delete(self.host, name)
        assert world.differences(self.empty, world.look(self.host)) == []


def _act(verb: str, mode: Mode, host: Host, name: str, events: Sink) -> object:
    return SCENARIOS[verb].act(host, mode, name, events)


def _names_of(record: Record) -> set[str]:
    """What the parts of an instance are called."""
    snapshots = {word for item in record.snapshots for word in (item.id, item.layer)}
    return {str(record.uuid), record.mac, *record.layers, *snapshots, *(disk.volume for disk in record.disks)} - {""}


class Stages:
    """The stage that stands; another is built when it is of no more use."""

    def __init__(self, host: Host, disk: SmallDisk) -> None:
        self.host, self.disk = host, disk
        self._current: Stage | None = None
        self._empty = world.look(host)

    @contextlib.contextmanager
    def stage(self, mode: Mode, verb: str) -> Iterator[Stage]:
        """A stage for a verb, as if it were new. What is not as before afterwards is cleared away."""
        current = self._current
        if current is None or (current.mode, current.verb) != (mode, verb):
            self.clear()
            current = self._current = Stage(self.host, mode, verb, self._empty)
        try:
            yield current
        except BaseException:
            self._current = None
            with contextlib.suppress(HvctlError, AssertionError):
                current.clear()
            with contextlib.suppress(HvctlError):  # so that the next one is not blamed
                gc.collect(self.host, orphans=True)
            self._empty = world.look(self.host)
            raise
        if world.differences(current.before, current.now):
            self.clear()

    def clear(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            current.clear()


def strike(stages: Stages, injection: Injection) -> None:
    """Do one fault, and see that everything holds that must hold."""
    with tally.counting(injection.fault, injection), stages.stage(injection.mode, injection.verb) as stage:
        if injection.fault in _KILLS:
            victims.die_at(stage.host.config, stage.deed, injection.verb, injection.step, stage.name)
            check_visible(stage)
            settle(stage, again=injection.fault is Fault.KILL_AGAIN)
            return
        error = _fail(stages, stage, injection)
        check_visible(stage)
        is_left = any(instance.record.pending for instance in stage.host.instances())
        settle(stage)
        if error is None:
            assert stage.is_done(), "it said that it was done"
        elif injection.fault in (Fault.CTRL_C, Fault.ERROR):
            assert stage.is_done() or not is_left, "it was not undone, though not committed"


def _fail(stages: Stages, stage: Stage, injection: Injection) -> BaseException | None:
    """Do the verb in this process, the fault when its step begins; what it raised."""
    fault, raised = injection.fault, False

    def befall(event: Event) -> None:
        nonlocal raised
        if not isinstance(event, StepStarted) or (event.verb, event.step) != (injection.verb, injection.step):
            return
        raised = True
        if fault is Fault.CTRL_C:
            raise KeyboardInterrupt
        if fault is Fault.ERROR:
            raise HostError("injected")
        if fault is Fault.LIBVIRTD:
            os.kill(int(Path("/run/libvirtd.pid").read_text()), signal.SIGKILL)
        else:
            stages.disk.fill(fault)

    error: BaseException | None = None
    try:
        stage.act(befall)
    except HvctlError as found:  # anything else is a traceback, and a violation
        error = found
    except KeyboardInterrupt as found:
        if fault is not Fault.CTRL_C:
            raise
        error = found
    finally:
        if fault is Fault.LIBVIRTD:
            restart_libvirtd(stage.host)
        elif fault in (Fault.FULL, Fault.NO_INODES):
            with contextlib.suppress(HvctlError):
                gc.collect(stage.host)  # it may fail, but must make nothing worse
            stages.disk.free()
    assert raised, f"{injection.verb} never came to its step {injection.step!r}"
    return error


def restart_libvirtd(host: Host) -> None:
    """Start another as `hvctl host setup` does, once the one that was killed is gone."""
    deadline_s = time.monotonic() + 30
    while find_running("libvirtd") and time.monotonic() < deadline_s:
        time.sleep(0.02)
    host.close()
    for change in daemons.missing(host):
        change.apply()


def check_visible(stage: Stage) -> None:
    """What has changed is complete, or listed as incomplete; of everybody else's nothing has."""
    changed = [line for line in stage.look() if "('building/" not in line]  # work aside, which nobody lists
    if changed:
        states = [item.state for item in stage.host.instances() if item.name.startswith(stage.name)]
        assert State.INCOMPLETE in states or stage.is_done(), changed


def settle(stage: Stage, *, again: bool = False) -> None:
    """Let `gc`, or the same command again, settle it: then it is done, or (gc) as before; and nothing is left to do."""
    host = stage.host
    if again:
        stage.act()
        assert stage.is_done()
    else:
        collected = gc.collect(host)
        assert all(item.is_done for item in collected), collected
    assert all(instance.record.pending is None for instance in host.instances())
    changed = stage.look()
    assert not changed or stage.is_done(), changed
    for instance in host.instances():
        xml = query.get_xml(host, instance)
        copy = host.read_text(host.store.definition(instance.record.uuid))
        assert world.in_order(metadata.embed(xml, instance.record)) == world.in_order(copy)
    assert gc.collect(host) == ()


@dataclass(frozen=True)
class Sweep:
    """A fault at one system call after another of a verb, or of the `gc` that settles it after a kill at a step."""

    mode: Mode
    verb: str
    calls: str
    fault: str
    """As strace(1) has it: `signal=KILL`, `error=ENOSPC`."""
    crashed_at: str = ""
    stride: int = 1


def sweep(stages: Stages, task: Sweep) -> int:
    """Do it until there are no more calls; how many there were."""
    for number in itertools.count(1, task.stride):
        with stages.stage(task.mode, task.verb) as stage:
            deed, settings = stage.deed, stage.host.config
            if task.crashed_at:
                victims.die_at(settings, deed, task.verb, task.crashed_at, stage.name)
                deed = _collect
            done = victims.fail_calls(settings, deed, stage.name, task.calls, f"{task.fault}:when={number}")
            if not done.was_hit:
                assert done.code == 0, done
                stage.look()
                return (number - 1) // task.stride
            kind = f"{task.fault} in gc" if task.crashed_at else f"{task.fault} at a call"
            with tally.counting(kind, f"{task.mode}-{task.verb}-{task.crashed_at}-{task.fault}-{number}"):
                assert done.code in (0, victims.REFUSED, -signal.SIGKILL), done
                check_visible(stage)
                settle(stage)
                assert task.crashed_at or done.code != 0 or stage.is_done(), "it said that it was done"
    raise AssertionError("endless")


def _collect(host: Host, _name: str, _events: Sink) -> object:
    return gc.collect(host)
