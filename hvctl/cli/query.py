"""`hvctl list`, `show`, `usage` and `logs`."""

from __future__ import annotations

import click

from hvctl.cli.app import App, output_options
from hvctl.cli.completion import INSTANCE
from hvctl.cli.plain import plain
from hvctl.cli.present import LIST_COLUMNS, as_json, as_pairs, as_row


@click.command("list")
@output_options
def list_(app: App) -> None:
    """List instances, from libvirt alone.

    Example: hvctl list --json
    """
    from hvctl.instances import query

    instances = query.list_instances(app.host)

    def for_people() -> None:
        if instances:
            app.print_table(LIST_COLUMNS, [as_row(instance) for instance in instances])
        else:
            click.echo("no instances yet; next: hvctl create NAME", err=True)

    def for_programs() -> list[dict[str, object]]:
        return [as_json(item, exit_code=query.find_exit_code(app.host, item)) for item in instances]

    app.print_result(for_programs() if app.is_json else None, for_people)


@click.command()
@click.argument("name", type=INSTANCE)
@click.option("--xml", is_flag=True, help="Print libvirt's definition instead.")
@output_options
def show(app: App, name: str, xml: bool) -> None:
    """Show everything about one instance.

    Example: hvctl show web
    """
    from hvctl.instances import query

    instance = query.get(app.host, name)
    if xml:
        text = query.get_xml(app.host, instance)
        app.print_result({"name": name, "xml": text}, lambda: click.echo(text, nl=False))
        return

    exit_code = query.find_exit_code(app.host, instance)

    def print_pairs() -> None:
        from hvctl.instances import disks

        app.print_pairs(as_pairs(instance, disks.get_root_size(app.host, instance.record), exit_code))

    app.print_result(as_json(instance, exit_code=exit_code), print_pairs)


@click.command()
@click.argument("names", metavar="NAME...", type=INSTANCE, nargs=-1, required=True)
@output_options
def usage(app: App, names: tuple[str, ...]) -> None:
    """Show what instances take of the host now: memory, and disk beyond their shared image.

    Example: hvctl usage web db
    """
    from hvctl.instances.usage import measure
    from hvctl.units import format_size

    found = [measure(app.host, name) for name in names]
    rows = [
        (
            item.instance.name,
            item.instance.record.mode.value,
            format_size(item.memory_bytes),
            format_size(item.disk_bytes),
        )
        for item in found
    ]
    fields = [
        {
            "name": item.instance.name,
            "mode": item.instance.record.mode.value,
            "memory_used_bytes": item.memory_bytes,
            "disk_used_bytes": item.disk_bytes,
        }
        for item in found
    ]
    app.print_result(fields, lambda: app.print_table(("NAME", "MODE", "MEMORY USED", "DISK USED"), rows))


@click.command()
@click.argument("name", type=INSTANCE)
@click.option("--lines", "-n", type=click.IntRange(1), default=None, help="Only the last ones.")
@output_options
def logs(app: App, name: str, lines: int | None) -> None:
    """Print what an instance wrote to its serial console.

    Example: hvctl logs web -n 50
    """
    from hvctl.instances import query

    instance = query.get(app.host, name)
    found = query.read_console(app.host, instance, lines=lines or 0)

    def for_people() -> None:
        if not found:
            click.echo(f"{name}: nothing is logged ({instance.state})", err=True)
        for line in found:
            click.echo(plain(line))

    app.print_result({"name": name, "lines": list(found)}, for_people)
