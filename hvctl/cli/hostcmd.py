"""`hvctl host setup | teardown | doctor | recover | features`."""

from __future__ import annotations

import click

from hvctl.cli.app import App, output_options
from hvctl.cli.main import LazyGroup
from hvctl.events import Sink
from hvctl.model import Mode

_TABLE = {
    "setup": ("hvctl.cli.hostcmd:setup", "Prepare this machine: directories, network, hooks, daemons."),
    "teardown": ("hvctl.cli.hostcmd:teardown", "Take back what setup made; data stays."),
    "doctor": ("hvctl.cli.doctor:doctor", "Check this machine, with the command that mends each finding."),
    "features": ("hvctl.cli.hostcmd:features", "Show what only one mode can."),
    "recover": ("hvctl.cli.hostcmd:recover", "Bring back an instance that libvirt has forgotten."),
}
_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be changed.")


@click.group(cls=LazyGroup, table=_TABLE)
def host() -> None:
    """Set up, check and repair this machine.

    Example: hvctl host doctor
    """


@click.command()
@_dry_run
@output_options
def setup(app: App, dry_run: bool) -> None:
    """Prepare this machine for hvctl; run again, it changes nothing.

    Example: hvctl host setup --dry-run
    """
    from hvctl import hostsetup

    with app.progress() as events:
        changes = hostsetup.setup(app.host, dry_run=dry_run, events=events)
    _report(app, [change.text for change in changes], dry_run, "this host is set up already")


@click.command()
@_dry_run
@output_options
def teardown(app: App, dry_run: bool) -> None:
    """Take back what `host setup` made. Refused while there are instances; images and other data stay.

    Example: hvctl host teardown --dry-run
    """
    from hvctl import hostsetup

    with app.progress() as events:
        changes = hostsetup.teardown(app.host, dry_run=dry_run, events=events)
    _report(app, [change.text for change in changes], dry_run, "there is nothing to take back")


@click.command()
@click.argument("names", metavar="[NAME...]", nargs=-1)
@output_options
def recover(app: App, names: tuple[str, ...]) -> None:
    """Bring instances back, with their data, after an accidental `virsh undefine`; without a name, list them.

    Example: hvctl host recover web
    """
    from hvctl.instances import recovery

    if not names:
        lost = [record.name for record in recovery.list_lost(app.host)]
        app.print_result(lost, lambda: click.echo("\n".join(lost) or "no instance is lost"))
        return

    def work(name: str, _events: Sink) -> object:
        return recovery.recover(app.host, name)

    app.for_each(names, work, lambda name, _record: app.say(f"{name}: recovered; next: hvctl start {name}"))


@click.command()
@output_options
def features(app: App) -> None:
    """Show what only one mode can; everything else works in both.

    Example: hvctl host features
    """
    from hvctl import backends

    found = backends.features()
    rows = [(item.name, *("yes" if mode in item.modes else "no" for mode in Mode)) for item in found]
    fields = [{"feature": item.name, "modes": [mode.value for mode in item.modes]} for item in found]
    app.print_result(fields, lambda: app.print_table(("FEATURE", *(mode.value.upper() for mode in Mode)), rows))


def _report(app: App, changes: list[str], dry_run: bool, nothing: str) -> None:
    def for_people() -> None:
        if not changes:
            click.echo(nothing)

    app.print_result({"changes": changes, "dry_run": dry_run}, for_people)
