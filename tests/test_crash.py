"""The fault campaign: a fault at every registered step of every verb, and at every system call of some, in both modes.

How a verb is done is in scenarios.py, where a new verb is added; what befalls it, and what must hold then, in campaign.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hvctl.config import Config
from hvctl.host import Host
from hvctl.instances.verbs import VERBS
from hvctl.model import Mode
from tests import campaign
from tests.campaign import Injection, Stages, Sweep
from tests.scenarios import IN_A_GUEST, POINTS, SCENARIOS, SWEPT, UNSUPPORTED

pytestmark = [pytest.mark.guest, pytest.mark.apart]


@pytest.fixture(scope="module")
def stages(host: Host, settings: Config) -> Iterator[Stages]:
    with campaign.prepared(settings) as (own_host, disk):
        prepared = Stages(own_host, disk)
        yield prepared
        prepared.clear()


def test_every_verb_has_a_scenario() -> None:
    assert set(SCENARIOS) | IN_A_GUEST == set(VERBS)


def test_the_daily_part_kills_at_every_step_and_has_every_fault_in_both_modes() -> None:
    daily = [injection for injection in campaign.plan() if injection.is_daily]
    killed = [(item.verb, item.step) for item in daily if item.fault.startswith("kill")]
    assert sorted(killed) == sorted(POINTS)
    for mode in Mode:
        assert {item.fault for item in daily if item.mode is mode} == set(campaign.Fault) - {campaign.Fault.LIBVIRTD}
        assert {item.verb for item in daily if item.mode is mode} >= set(SCENARIOS) - {"disk-set"}


@pytest.mark.parametrize(
    "injection",
    [
        pytest.param(injection, id=str(injection), marks=[] if injection.is_daily else [pytest.mark.long])
        for injection in campaign.plan()
    ],
)
def test_after_a_fault_all_is_whole_or_visibly_not_and_converges(stages: Stages, injection: Injection) -> None:
    campaign.strike(stages, injection)


# What changes a file. Not write(2): most are of libvirt's threads waking one another, and the content of a file is synced.
CHANGING = (
    "pwrite64,pwritev,copy_file_range,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,mknodat,link,"
    "linkat,symlink,symlinkat,fsync,fdatasync,ftruncate,fallocate,chmod,fchmod,fchmodat,chown,fchown,fchownat,lchown,"
    "setxattr,fsetxattr,lsetxattr"
)
# What can find no space: of writing only that to a place in a file, which is no pipe and no socket.
FILLING = (
    "pwrite64,pwritev,copy_file_range,rename,renameat,renameat2,mkdir,mkdirat,mknodat,link,linkat,symlink,symlinkat,fsync,"
    "fdatasync,ftruncate,fallocate,setxattr,fsetxattr,lsetxattr"
)
FAULTS = {"signal=KILL": CHANGING, "error=ENOSPC": FILLING}


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", SWEPT)
def test_after_a_fault_at_any_system_call_as_well(stages: Stages, mode: Mode, verb: str, fault: str) -> None:
    count = campaign.sweep(stages, Sweep(mode, verb, FAULTS[fault], fault))
    needs_no_space = (verb, fault) == ("delete", "error=ENOSPC")
    assert (count == 0) == needs_no_space


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_at_some_system_calls_as_well(stages: Stages, mode: Mode, fault: str) -> None:
    """The way of the long ones, each day on one verb."""
    assert campaign.sweep(stages, Sweep(mode, "snapshot-take", FAULTS[fault], fault, stride=5)) > 0


def test_what_a_write_has_left_that_was_killed_goes_too(stages: Stages, mode: Mode) -> None:
    """A file beside the name that it never got, that of the private host key among them."""
    assert campaign.sweep(stages, Sweep(mode, "convert", "rename", "signal=KILL")) > 0


def test_a_file_system_whose_growth_is_cut_short_is_whole_again(stages: Stages) -> None:
    """resize2fs, too, is without space at some call: alone it leaves what e2fsck does not mend by itself."""
    task = Sweep(Mode.CONTAINER, "disk-resize", FILLING, "error=ENOSPC", stride=4, crashed_at="grow")
    assert campaign.sweep(stages, task) > 0


def around_the_commit(verb: str) -> set[str]:
    """A step at which the most is to be undone, and one at which the most is to be finished."""
    names, commit = VERBS[verb].step_names(), VERBS[verb].index(VERBS[verb].commit)
    return {names[max(commit, 1)], names[commit + 1]}


SETTLED = [(verb, step) for verb, step in POINTS if step in around_the_commit(verb)]


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("verb", "step"), SETTLED)
def test_a_gc_that_fails_at_any_system_call_is_done_by_the_next(
    stages: Stages, mode: Mode, verb: str, step: str, fault: str
) -> None:
    if (verb, mode) not in UNSUPPORTED:
        campaign.sweep(stages, Sweep(mode, verb, FAULTS[fault], fault, crashed_at=step))
