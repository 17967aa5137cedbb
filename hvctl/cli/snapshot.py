"""`hvctl snapshot take | list | show | revert | delete | diff | tick`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from hvctl.cli.app import App, Group, confirm, output_options, yes_option
from hvctl.cli.completion import INSTANCE, SNAPSHOT
from hvctl.cli.present import format_age
from hvctl.model import Wait
from hvctl.units import format_size

if TYPE_CHECKING:
    from hvctl.model import Record, Snapshot


@click.group(cls=Group)
def snapshot() -> None:
    """Keep what an instance is at a moment, go back to it, branch from it. The same for VMs and containers.

    Example: hvctl snapshot take web before-upgrade
    """


@snapshot.command()
@click.argument("name", type=INSTANCE)
@click.argument("snap", required=False, default="")
@click.option("--comment", default="", help="A line to remember it by.")
@click.option("--memory", is_flag=True, help="Keep a running VM's memory, too: a revert goes on in that moment.")
@output_options
def take(app: App, name: str, snap: str, comment: str, memory: bool) -> None:
    """Take a snapshot, running or not; without a name the time makes one.

    A running guest's file systems are held still for the moment; where that is not possible it says so.

    Example: hvctl snapshot take web before-upgrade --comment 'works'
    """
    from hvctl.instances import query, snapshots

    request = snapshots.Take(name=snap, comment=comment, with_memory=memory)
    with app.progress() as events:
        taken = snapshots.take(app.host, name, request, events)
    record = query.get(app.host, name).record
    text = f"{name}: snapshot {taken.name} ({taken.consistency})"
    app.print_result(_as_json(app, record, taken), lambda: click.echo(text))


@snapshot.command("list")
@click.argument("names", metavar="[NAME...]", type=INSTANCE, nargs=-1)
@output_options
def list_(app: App, names: tuple[str, ...]) -> None:
    """List snapshots, each under the one that it came from; `*` marks where the instance is now.

    Example: hvctl snapshot list web
    """
    from hvctl.instances import query

    if names:
        records = [query.get(app.host, name).record for name in names]
    else:
        records = [instance.record for instance in query.list_instances(app.host)]
    rows = [row for record in records for row in _tree(app, record)]
    app.print_result(
        [_as_json(app, record, item) for record in records for item in _listed(record)],
        lambda: app.print_table(("INSTANCE", "SNAPSHOT", "MODE", "AGE", "HOW", "SIZE", "COMMENT"), rows),
    )


@snapshot.command()
@click.argument("name", type=INSTANCE)
@click.argument("snap", type=SNAPSHOT)
@output_options
def show(app: App, name: str, snap: str) -> None:
    """Show everything about one snapshot.

    Example: hvctl snapshot show web before-upgrade
    """
    from hvctl.instances import query, snapshots

    record = query.get(app.host, name).record
    item = snapshots.get_snapshot(record, snap)
    facts = _as_json(app, record, item)
    pairs = [(key, str(value)) for key, value in facts.items() if key != "size_bytes"]
    size_bytes = _measure(app, record, item)
    shown = [*pairs, ("size", "" if size_bytes is None else format_size(size_bytes))]
    app.print_result(facts, lambda: app.print_pairs(shown))


@snapshot.command()
@click.argument("name", type=INSTANCE)
@click.argument("snap", type=SNAPSHOT)
@click.option("--force", is_flag=True, help="End it if it runs, like pulling the plug, and start it again afterwards.")
@click.option("--wait", type=click.Choice([wait.value for wait in Wait]), default="ssh", show_default=True)
@yes_option
@output_options
def revert(app: App, name: str, snap: str, force: bool, wait: str, yes: bool) -> None:
    """Go back to a snapshot; what changed since is lost, all snapshots stay.

    Files, sizes and definition are as they were; name, address, keys and data disks stay as they are. One that was
    taken with --memory goes on in that very moment.

    Example: hvctl snapshot revert web before-upgrade
    """
    from hvctl.instances import query, snapshots

    snapshots.get_snapshot(query.get(app.host, name).record, snap)
    confirm(app, f"Give up what changed in {name} and go back to {snap}?", yes=yes)
    with app.progress() as events:
        is_running = snapshots.revert(app.host, name, snap, force=force, goal=Wait(wait), events=events)
    tail = "running" if is_running else f"next: hvctl start {name}"
    app.print_result(
        {"name": name, "snapshot": snap, "running": is_running}, lambda: click.echo(f"{name}: is at {snap}; {tail}")
    )


@snapshot.command()
@click.argument("name", type=INSTANCE)
@click.argument("snaps", metavar="SNAP...", type=SNAPSHOT, nargs=-1, required=True)
@yes_option
@output_options
def delete(app: App, name: str, snaps: tuple[str, ...], yes: bool) -> None:
    """Delete snapshots, in any order. What other snapshots or copies stand on stays until nobody does.

    Example: hvctl snapshot delete web before-upgrade
    """
    from hvctl.instances import query, snapshots

    record = query.get(app.host, name).record
    if not record.pending:
        for snap in snaps:
            snapshots.get_snapshot(record, snap)
    confirm(app, f"Delete {', '.join(snaps)} of {name}?", yes=yes)
    with app.progress() as events:
        for snap in snaps:
            snapshots.delete(app.host, name, snap, events)
            app.say(f"{name}: snapshot {snap} deleted")
    app.print_result([{"name": name, "snapshot": snap} for snap in snaps], lambda: None)


@snapshot.command()
@click.argument("name", type=INSTANCE)
@click.argument("old", metavar="SNAP", type=SNAPSHOT)
@click.argument("new", metavar="[SNAP]", type=SNAPSHOT, required=False, default="")
@output_options
def diff(app: App, name: str, old: str, new: str) -> None:
    """Show which files changed between two snapshots, or since one (while it is off).

    Of a VM: in the file system of its root, if that is ext2, ext3 or ext4.

    Example: hvctl snapshot diff box before-upgrade after-upgrade
    """
    from hvctl.instances import snapshots

    with app.progress() as events:
        found = snapshots.diff(app.host, name, old, new, events)

    def for_people() -> None:
        for kind, path in found:
            shown = path if path.isprintable() else repr(path)
            click.echo(f"{kind:8}{shown}")
        if not found:
            click.echo("no file differs")

    app.print_result(
        [{"change": kind, "path": os.fsencode(path).decode(errors="replace")} for kind, path in found], for_people
    )


@snapshot.command()
@output_options
def tick(app: App) -> None:
    """Take the snapshots that schedules want now, and let old ones expire; for a timer, every hour.

    Where systemd is there, `hvctl host setup` installs the timer. Elsewhere: `7 * * * * root hvctl snapshot tick` in
    /etc/cron.d. It prints nothing where nothing is due.

    Example: hvctl snapshot tick
    """
    from hvctl.instances import schedule

    with app.progress() as events:
        done = schedule.tick(app.host, events=events)

    def for_people() -> None:
        for item in done:
            if item.taken:
                click.echo(f"{item.name}: snapshot {item.taken}")
            for expired in item.expired:
                click.echo(f"{item.name}: {expired} expired")

    facts = [{"name": item.name, "taken": item.taken or None, "expired": list(item.expired)} for item in done]
    app.print_result(facts, for_people)
    failures = [item.error for item in done if item.error is not None]
    for error in failures[1:]:
        app.print_error(error)
    if failures:
        raise failures[0]


def _listed(record: Record) -> tuple[Snapshot, ...]:
    from hvctl.instances import snapshots

    return snapshots.list_snapshots(record)


def _as_json(app: App, record: Record, item: Snapshot) -> dict[str, object]:
    """A snapshot for programs. Names here are part of the interface: add, never rename."""
    names = {other.id: other.name for other in record.snapshots}
    return {
        "instance": record.name,
        "name": item.name,
        "taken_at": item.taken_at,
        "consistency": item.consistency.value,
        "purpose": item.purpose.value,
        "mode": item.mode.value,
        "parent": names.get(item.parent),
        "current": record.current == item.id,
        "comment": item.comment,
        "id": item.id,
        "layer": item.layer or None,
        "size_bytes": _measure(app, record, item),
    }


def _measure(app: App, record: Record, item: Snapshot) -> int | None:
    """Bytes that it takes; None where this user may not look."""
    from hvctl.errors import HvctlError
    from hvctl.instances import snapshots

    try:
        return snapshots.measure(app.host, record, item)
    except HvctlError:
        return None


def _tree(app: App, record: Record) -> list[tuple[str, ...]]:
    """The lines of one instance, children below their parents, two spaces further in."""
    listed = _listed(record)
    known = {item.id for item in listed}
    rows: list[tuple[str, ...]] = []
    waiting = [(item, 0) for item in reversed(listed) if item.parent not in known]
    while waiting:
        item, depth = waiting.pop()
        mark = "*" if item.id == record.current else ""
        size_bytes = _measure(app, record, item)
        size = "-" if size_bytes is None else format_size(size_bytes)
        shown = f"{'  ' * depth}{item.name}{mark}"
        age, how = format_age(item.taken_at), item.consistency.value
        rows.append((record.name, shown, item.mode.value, age, how, size, item.comment))
        waiting += [(child, depth + 1) for child in reversed(listed) if child.parent == item.id]
    return rows
