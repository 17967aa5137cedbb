"""`hvctl convert`."""

from __future__ import annotations

import click

from hvctl.cli.app import App, confirm, output_options, yes_option
from hvctl.cli.completion import INSTANCE
from hvctl.cli.present import as_json
from hvctl.events import Note
from hvctl.model import Instance, Mode, State


@click.command()
@click.argument("name", type=INSTANCE)
@click.option("--to", "mode", type=click.Choice([mode.value for mode in Mode]), required=True, help="What it becomes.")
@click.option("--keep-source", is_flag=True, help="Keep what it was as a snapshot even after the new one has answered.")
@click.option("--no-start", is_flag=True, help="Do not start it again if it runs; what it was is kept as a snapshot.")
@click.option("--timeout", type=click.FloatRange(1), default=180, show_default=True, help="Seconds to wait for ssh.")
@yes_option
@output_options
def convert(app: App, name: str, mode: str, keep_source: bool, no_start: bool, timeout: float, yes: bool) -> None:
    """Change a VM into a container, or a container into a VM.

    Name, address, MAC, ssh host key, users, files and the list of snapshots stay. If it runs it is shut down, and what it
    becomes is started; until that has answered over ssh what it was stays as it is, and comes back if that fails. If it
    is off, what it was is kept as a snapshot, whose name is printed.

    Example: hvctl convert web --to container
    """
    from hvctl.instances import convert as verb
    from hvctl.instances import query

    target = Mode(mode)
    instance = query.get(app.host, name)
    lost = verb.list_losses(app.host, name, target)
    with app.progress() as events:
        for text in lost:
            events(Note(name, f"it gives up {text}"))
    if instance.record.mode is not target:
        confirm(app, _question(instance, target), yes=yes, why=f"this changes what {name} is")
    request = verb.Request(name=name, mode=target, keep_source=keep_source, start=not no_start, timeout_s=timeout)
    with app.progress() as events:
        outcome = verb.convert(app.host, request, events)
    facts = {
        **as_json(outcome.instance),
        "changed": outcome.is_changed,
        "source": outcome.kept or None,
        "lost": list(lost),
    }
    app.print_result(facts, lambda: _tell(outcome.instance, target, outcome.is_changed, outcome.kept))


def _question(instance: Instance, target: Mode) -> str:
    act = "Shut down and convert" if instance.state is State.RUNNING else "Convert"
    return f"{act} {instance.name} from {instance.record.mode} to {target}?"


def _tell(instance: Instance, target: Mode, is_changed: bool, kept: str) -> None:
    from hvctl.backends import get_backend

    name = instance.name
    noun = get_backend(target).noun
    if not is_changed and not kept:
        click.echo(f"{name}: is {noun} already")
        return
    verb = "ssh" if instance.state is State.RUNNING else "start"
    click.echo(f"{name}: {noun} now, {instance.state}, {instance.record.address}; next: hvctl {verb} {name}")
    if kept:
        click.echo(f"{name}: as it was: snapshot {kept}; to give that up: hvctl snapshot delete {name} {kept}")
