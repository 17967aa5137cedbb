"""`hvctl start`, `stop`, `restart`, `pause`, `resume` and `delete`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from hvctl.cli.app import App, confirm, output_options
from hvctl.cli.completion import INSTANCE
from hvctl.events import Sink
from hvctl.model import Instance, Wait

_names = click.argument("names", metavar="NAME...", type=INSTANCE, nargs=-1, required=True)
_wait = click.option("--wait", type=click.Choice([wait.value for wait in Wait]), default="ssh", show_default=True)
_start_timeout = click.option(
    "--timeout", type=click.FloatRange(1), default=180, show_default=True, help="Seconds to wait."
)


def _each(app: App, names: tuple[str, ...], work: Callable[[str, Sink], object], texts: tuple[str, str]) -> None:
    """Do it on every name; a verb that found its end state says so and is no failure."""
    results: list[dict[str, Any]] = []

    def done(name: str, changed: object) -> None:
        text = texts[0] if changed is not False else texts[1]
        results.append({"name": name, "changed": changed is not False})
        app.say(f"{name}: {text}")

    try:
        app.for_each(names, work, done)
    finally:
        if app.is_json:
            app.print_result(results, lambda: None)


@click.command()
@_names
@_wait
@_start_timeout
@output_options
def start(app: App, names: tuple[str, ...], wait: str, timeout: float) -> None:
    """Start, and wait until the guest answers.

    Example: hvctl start web db
    """
    from hvctl.instances import lifecycle

    def work(name: str, events: Sink) -> bool:
        return lifecycle.start(app.host, name, goal=Wait(wait), timeout_s=timeout, events=events)

    _each(app, names, work, ("started", "was running already"))


@click.command()
@_names
@click.option("--timeout", type=click.FloatRange(0), default=60, show_default=True, help="Seconds to wait.")
@click.option("--force", is_flag=True, help="Kill it: like pulling the plug.")
@output_options
def stop(app: App, names: tuple[str, ...], timeout: float, force: bool) -> None:
    """Ask the guest to shut down and wait; it is left running (exit 10) when it does not within the time.

    Example: hvctl stop web
    """
    from hvctl.instances import lifecycle

    def work(name: str, events: Sink) -> bool:
        return lifecycle.stop(app.host, name, timeout_s=timeout, force=force, events=events)

    _each(app, names, work, ("stopped", "was stopped already"))


@click.command()
@_names
@_wait
@_start_timeout
@click.option("--force", is_flag=True, help="Kill it instead of asking it to shut down.")
@output_options
def restart(app: App, names: tuple[str, ...], wait: str, timeout: float, force: bool) -> None:
    """Stop and start again; a changed definition takes effect.

    Example: hvctl restart web
    """
    from hvctl.instances import lifecycle

    def work(name: str, events: Sink) -> None:
        lifecycle.restart(app.host, name, goal=Wait(wait), timeout_s=timeout, force=force, events=events)

    _each(app, names, work, ("restarted", ""))


@click.command()
@_names
@output_options
def pause(app: App, names: tuple[str, ...]) -> None:
    """Freeze running instances in memory.

    Example: hvctl pause web
    """
    from hvctl.instances import lifecycle

    _each(app, names, lambda name, _events: lifecycle.pause(app.host, name), ("paused", "was paused already"))


@click.command()
@_names
@output_options
def resume(app: App, names: tuple[str, ...]) -> None:
    """Let paused instances go on.

    Example: hvctl resume web
    """
    from hvctl.instances import lifecycle

    _each(app, names, lambda name, _events: lifecycle.resume(app.host, name), ("resumed", "was running already"))


@click.command()
@_names
@click.option("--keep-volumes", is_flag=True, help="Keep their data volumes: hvctl disk list --unattached.")
@click.option("--yes", "-y", "--force", "-f", is_flag=True, help="Do not ask.")  # others' users type -f
@output_options
def delete(app: App, names: tuple[str, ...], keep_volumes: bool, yes: bool) -> None:
    """Delete instances, running or not, with their disks, volumes, keys and addresses. Images stay.

    Example: hvctl delete --yes web
    """
    from hvctl.instances import lifecycle, query

    if not yes:
        confirm(app, _question([query.get(app.host, name) for name in names], keep_volumes=keep_volumes), yes=yes)

    def work(name: str, events: Sink) -> None:
        lifecycle.delete(app.host, name, events, keep_volumes=keep_volumes)

    _each(app, names, work, ("deleted", ""))


def _question(found: list[Instance], *, keep_volumes: bool) -> str:
    """What goes with them, and what stays."""
    from hvctl.instances.snapshots import list_snapshots

    states = ", ".join(f"{instance.name} ({instance.state})" for instance in found)
    count = sum(len(list_snapshots(instance.record)) for instance in found)
    volumes = ", ".join(disk.name for instance in found for disk in instance.record.disks if disk.volume)
    taken = f" and {count} snapshot{'s' * (count != 1)}" if count else ""
    more = f", {'and keep' if keep_volumes else 'also'} the volumes {volumes}" if volumes else ""
    return f"Delete {states} with all data{taken}{more}?"
