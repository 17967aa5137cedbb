"""`hvctl copy`."""

from __future__ import annotations

import click

from hvctl.cli.app import App, output_options
from hvctl.cli.completion import INSTANCE
from hvctl.cli.present import as_json
from hvctl.events import Sink
from hvctl.model import Instance, State, Wait


@click.command()
@click.argument("source", metavar="SOURCE[@SNAPSHOT]", type=INSTANCE)
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--full", is_flag=True, help="Share nothing but the image with the source.")
@click.option("--no-start", is_flag=True, help="Only make it.")
@click.option("--wait", type=click.Choice([wait.value for wait in Wait]), default="ssh", show_default=True)
@click.option("--timeout", type=click.FloatRange(1), default=180, show_default=True, help="Seconds to wait.")
@output_options
def copy(app: App, source: str, names: tuple[str, ...], full: bool, no_start: bool, wait: str, timeout: float) -> None:
    """Make instances that begin as another is now, or was at a snapshot, and start them.

    Nothing is copied: they stand on the same layers, which stay as long as anybody does. Each has a name, ssh host key,
    machine id, MAC and address of its own. Data disks are left out, and user data is not run again.

    Example: hvctl copy web@before-upgrade web-test
    """
    from hvctl.instances import copies

    of, _at, snapshot = source.partition("@")
    made: list[Instance] = []

    def work(name: str, events: Sink) -> Instance:
        request = copies.Request(
            source=of,
            name=name,
            snapshot=snapshot,
            is_full=full,
            start=not no_start,
            wait=Wait(wait),
            timeout_s=timeout,
        )
        return copies.copy(app.host, request, events)

    def done(name: str, instance: Instance) -> None:
        made.append(instance)
        where = f", {instance.record.address}" if instance.record.address else ""
        verb = "ssh" if instance.state is State.RUNNING else "start"
        app.say(f"{name}: copy of {source}, {instance.state}{where}; next: hvctl {verb} {name}")

    try:
        app.for_each(names, work, done)
    finally:
        if app.is_json and made:
            app.print_result([as_json(instance) for instance in made], lambda: None)
