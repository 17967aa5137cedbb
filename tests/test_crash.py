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
from tests.campaign import Injection, Stages
from tests.scenarios import IN_A_GUEST, POINTS, SCENARIOS

pytestmark = pytest.mark.guest


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
