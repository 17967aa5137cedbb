"""`hvctl gc`."""

from __future__ import annotations

import dataclasses

import click

from hvctl.cli.app import App, output_options


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--orphans", is_flag=True, help="Remove layers and directories that no instance owns, too.")
@output_options
def gc(app: App, dry_run: bool, orphans: bool) -> None:
    """Finish or undo what a crash left behind. Does nothing where nothing was left.

    Example: hvctl gc --dry-run
    """
    from hvctl import gc as collector

    found = collector.collect(app.host, dry_run=dry_run, orphans=orphans)

    def for_people() -> None:
        for item in found:
            click.echo(f"{item.what}: {item.action}")
        if not found:
            click.echo("nothing to collect")

    app.print_result([dataclasses.asdict(item) for item in found], for_people)
