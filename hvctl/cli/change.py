"""`hvctl rename`, `set` and `kernel`."""

from __future__ import annotations

import click

from hvctl.cli.app import App, output_options
from hvctl.cli.completion import INSTANCE
from hvctl.cli.parameters import SIZE
from hvctl.errors import UsageError
from hvctl.units import format_size


@click.command()
@click.argument("old", type=INSTANCE)
@click.argument("new")
@output_options
def rename(app: App, old: str, new: str) -> None:
    """Give a stopped instance another name.

    Example: hvctl rename web www
    """
    from hvctl.instances import change

    with app.progress() as events:
        change.rename(app.host, old, new, events)
    app.print_result({"name": new, "was": old}, lambda: click.echo(f"{new}: was {old}"))


@click.command("set")
@click.argument("name", type=INSTANCE)
@click.option("--cpus", type=click.IntRange(1))
@click.option("--memory", type=SIZE, help="512M, 2GiB, ...")
@click.option("--autostart/--no-autostart", default=None, help="Start it when the host boots, or not.")
@click.option("--keep", metavar="hourly=24,daily=7", help="Take and keep snapshots by the clock; `none`: no more.")
@output_options
def set_(app: App, name: str, cpus: int | None, memory: int | None, autostart: bool | None, keep: str | None) -> None:
    """Change CPUs, memory, autostart or the schedule of snapshots; says for each whether it is live or waits.

    Example: hvctl set web --memory 2GiB --autostart
    """
    from hvctl.instances import change, schedule

    if cpus is None and memory is None and autostart is None and keep is None:
        raise UsageError("nothing to change", hint="hvctl set --help")
    rules = None if keep is None else schedule.parse_keep(keep)
    changes = change.Changes(cpus=cpus, memory_bytes=memory, is_autostart=autostart, keep=rules)
    with app.progress() as events:
        done = change.set_(app.host, name, changes, events)

    def for_people() -> None:
        for item in done:
            when = "now" if item.is_live else f"from the next start on: hvctl restart {name}"
            value = format_size(memory) if memory and item.field == "memory" else item.value
            click.echo(f"{name}: {item.field} {value}, {when}")

    app.print_result([{"field": item.field, "value": item.value, "live": item.is_live} for item in done], for_people)


@click.command()
@click.argument("name", type=INSTANCE)
@output_options
def kernel(app: App, name: str) -> None:
    """Let a running guest boot the newest kernel that is installed in it, from its next start on.

    For guests of images that hvctl builds; others boot their kernel themselves.

    Example: hvctl kernel web
    """
    from hvctl.instances.kernel import update_kernel

    with app.progress() as events:
        release = update_kernel(app.host, name, events)
    text = f"{name}: boots {release} from the next start on; next: hvctl restart {name}"
    app.print_result({"name": name, "kernel": release}, lambda: click.echo(text))
