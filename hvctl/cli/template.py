"""`hvctl template list | show | check | render`."""

from __future__ import annotations

import click

from hvctl.cli.app import App, Group, output_options
from hvctl.cli.parameters import PAIR
from hvctl.model import Mode

_mode = click.option("--mode", type=click.Choice([mode.value for mode in Mode]), default="vm", show_default=True)
_set = click.option("--set", "variables", metavar="K=V", type=PAIR, multiple=True, help="A value for vars.K.")


@click.group(cls=Group)
def template() -> None:
    """List, show, check and render templates: the Jinja files that domains are made from.

    Example: hvctl template list
    """


@template.command("list")
@output_options
def list_(app: App) -> None:
    """List templates; one of your own hides a built-in one of the same name.

    Example: hvctl template list
    """
    from hvctl import templates

    found = templates.list_templates(app.host.config.template_folders)
    app.print_result(
        [
            {
                "name": item.name,
                "mode": item.mode.value,
                "path": str(item.path),
                "purpose": item.purpose,
                "builtin": item.is_builtin,
            }
            for item in found
        ],
        lambda: app.print_table(
            ("NAME", "MODE", "FROM", "PURPOSE"),
            [
                (item.name, item.mode.value, "hvctl" if item.is_builtin else str(item.path.parent), item.purpose)
                for item in found
            ],
        ),
    )


@template.command()
@click.argument("name")
@_mode
@output_options
def show(app: App, name: str, mode: str) -> None:
    """Print a template as it is written; save it, edit it, and give its path to `create --template`.

    Example: hvctl template show default > mine.xml
    """
    from hvctl import templates

    found = templates.get_template(Mode(mode), name, app.host.config.template_folders)
    click.echo(found.path.read_text(), nl=False)


@template.command()
@click.argument("name")
@_mode
@_set
@output_options
def render(app: App, name: str, mode: str, variables: tuple[tuple[str, str], ...]) -> None:
    """Print the definition that a template gives with example values.

    Example: hvctl template render default
    """
    from hvctl.instances import examples

    click.echo(examples.render_example(app.host, Mode(mode), name, dict(variables)), nl=False)


@template.command()
@click.argument("name")
@_mode
@_set
@output_options
def check(app: App, name: str, mode: str, variables: tuple[tuple[str, str], ...]) -> None:
    """Check a template: well-formed, every name known, and valid for libvirt's schema. Exit 7 when it is not.

    Example: hvctl template check ./mine.xml --set vlan=5
    """
    from hvctl.instances import examples

    examples.check(app.host, Mode(mode), name, dict(variables))
    app.print_result({"name": name, "ok": True}, lambda: click.echo(f"{name}: ok"))
