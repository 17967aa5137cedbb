"""Schedules: which automatic snapshots an instance is to have, from the time alone; `tick` makes it so.

`hourly=24,daily=7` keeps the last snapshot of each of the last 24 hours that have one, and of the last 7 days that do.
Hours and days are UTC's. A tick that was missed is not made up for: the next one takes what is due then.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

from hvctl.errors import HvctlError, InvalidSpec
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.instances import compact, query, snapshots
from hvctl.instances.snapshots import Take
from hvctl.model import Purpose, Record
from hvctl.values import dataclass

Keep = tuple[tuple[str, int], ...]
Taken = tuple[str, datetime.datetime]

PERIODS: dict[str, Callable[[datetime.datetime], tuple[int, ...]]] = {
    "hourly": lambda time: (time.year, time.month, time.day, time.hour),
    "daily": lambda time: (time.year, time.month, time.day),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
}
_MOST = 1000


@dataclass(frozen=True, kw_only=True)
class Ticked:
    """What was done for one instance."""

    name: str
    taken: str = ""
    expired: tuple[str, ...] = ()
    error: HvctlError | None = None


def parse_keep(text: str) -> Keep:
    """`hourly=24,daily=7` as pairs; `none` is no schedule. Raises InvalidSpec."""
    if text == "none":
        return ()
    found: dict[str, int] = {}
    for part in text.split(","):
        every, _equals, count = part.strip().partition("=")
        is_number = count.isascii() and count.isdigit()
        if every not in PERIODS or every in found or not is_number or not 1 <= int(count) <= _MOST:
            raise InvalidSpec(
                f"{part[:40]!r} is no part of a schedule",
                hint=f"--keep hourly=24,daily=7 ({', '.join(PERIODS)}; 1 to {_MOST}), or --keep none",
            )
        found[every] = int(count)
    return tuple(found.items())


def format_keep(keep: Keep) -> str:
    """The pairs as they are written; `none` for none."""
    return ",".join(f"{every}={count}" for every, count in keep) or "none"


def is_due(keep: Keep, taken: Sequence[Taken], now: datetime.datetime) -> bool:
    """Whether some period that is kept has no snapshot yet."""
    return any(all(PERIODS[every](time) != PERIODS[every](now) for _id, time in taken) for every, _count in keep)


def list_expired(keep: Keep, taken: Sequence[Taken]) -> tuple[str, ...]:
    """Identifiers of the snapshots that no rule keeps; of two of one second the later in the list is the newer."""
    by_age = sorted(enumerate(taken), key=lambda pair: (pair[1][1], pair[0]), reverse=True)
    newest_first = [item for _number, item in by_age]
    kept = set()
    for every, count in keep:
        slots: dict[tuple[int, ...], str] = {}
        for identifier, time in newest_first:
            slots.setdefault(PERIODS[every](time), identifier)
        kept |= set(list(slots.values())[:count])
    return tuple(identifier for identifier, _time in newest_first if identifier not in kept)


def tick(host: Host, *, now: datetime.datetime | None = None, events: Sink = ignore) -> tuple[Ticked, ...]:
    """Take what is due, let what is old expire and compact what is deep, for every instance with a schedule.

    What somebody named is never touched. A failure on one instance is in its result, and the next one is gone on with.
    """
    host.require_root("snapshot tick")
    now = now or datetime.datetime.now(datetime.UTC)
    names = [instance.name for instance in host.instances() if instance.record.keep]
    return tuple(_tick(host, name, now, events) for name in names)


def list_automatic(record: Record) -> tuple[Taken, ...]:
    """The snapshots that the schedule took, and when."""
    return tuple(
        (item.id, datetime.datetime.fromisoformat(item.taken_at))
        for item in record.snapshots
        if item.purpose is Purpose.SCHEDULE
    )


def _tick(host: Host, name: str, now: datetime.datetime, events: Sink) -> Ticked:
    taken, expired = "", []
    try:
        record = query.get(host, name).record
        if is_due(record.keep, list_automatic(record), now):
            taken = snapshots.take(host, name, Take(purpose=Purpose.SCHEDULE), events).name
            record = query.get(host, name).record
        names = {item.id: item.name for item in record.snapshots}
        for identifier in list_expired(record.keep, list_automatic(record)):
            snapshots.delete(host, name, names[identifier], events)
            expired.append(names[identifier])
        compact.compact(host, name, events=events)
    except HvctlError as error:
        return Ticked(name=name, taken=taken, expired=tuple(expired), error=error)
    return Ticked(name=name, taken=taken, expired=tuple(expired))
