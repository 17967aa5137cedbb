"""Schedules: from the time alone, what is due and what has expired."""

from __future__ import annotations

import datetime
import random

import pytest

from hvctl.errors import InvalidSpec
from hvctl.instances import schedule

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)


def live(keep: schedule.Keep, ticks: list[datetime.datetime]) -> list[datetime.datetime]:
    """The times of the snapshots that are there after ticks at these times."""
    there: list[schedule.Taken] = []
    for now in ticks:
        if schedule.is_due(keep, there, now):
            there.append((now.isoformat(), now))
        expired = schedule.list_expired(keep, there)
        there = [item for item in there if item[0] not in expired]
    return [time for _id, time in there]


def test_a_month_of_hours_leaves_what_was_asked_for() -> None:
    ticks = [START + number * HOUR for number in range(31 * 24)]
    there = live((("hourly", 24), ("daily", 7)), ticks)
    assert there[-24:] == ticks[-24:]
    assert [(time.day, time.hour) for time in there[:-24]] == [(day, 23) for day in range(25, 31)]


def test_a_second_tick_in_the_hour_takes_nothing() -> None:
    keep = (("hourly", 2), ("monthly", 1))
    assert live(keep, [START, START + HOUR / 2, START + HOUR]) == [START, START + HOUR]


def test_hours_that_were_missed_are_not_counted() -> None:
    ticks = [START, START + 50 * HOUR, START + 51 * HOUR]
    assert live((("hourly", 3),), ticks) == ticks


@pytest.mark.parametrize("seed", range(20))
def test_there_are_never_more_than_all_rules_together(seed: int) -> None:
    dice = random.Random(seed)
    keep = (("hourly", dice.randrange(1, 9)), ("weekly", dice.randrange(1, 4)), ("monthly", 2))
    ticks = sorted(START + dice.randrange(24 * 200) * HOUR for _tick in range(300))
    there = live(keep, ticks)
    assert there[-1] == ticks[-1]
    assert len(there) <= sum(count for _every, count in keep)


def test_a_schedule_is_read_as_it_is_written() -> None:
    keep = schedule.parse_keep("hourly=24, daily=7")
    assert keep == (("hourly", 24), ("daily", 7))
    assert schedule.parse_keep(schedule.format_keep(keep)) == keep
    assert schedule.parse_keep(schedule.format_keep(())) == ()


@pytest.mark.parametrize(
    "text", ["", "hourly", "hourly=", "hourly=0", "hourly=-1", "yearly=1", "daily=1,daily=2", "daily=1001", "daily=²"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match="schedule"):
        schedule.parse_keep(text)
