"""`hvctl template list | show | check | render`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from hvctl.cli.app import App, Group, output_options
from hvctl.cli.completion import TEMPLATE
from hvctl.cli.parameters import PAIR
from hvctl.model import Mode

_modes = (
    click.option("--mode", type=click.Choice([mode.value for mode in Mode]), help="Whose template (default: a VM's)."),
    click.option("--container", "mode", flag_value="container", help="The same as --mode container."),
    click.option("--vm", "mode", flag_value="vm", help="The same as --mode vm."),
)
_F = TypeVar("_F", bound=Callable[..., object])


def _mode(function: _F) -> _F:
    """`--mode`, and as `create` says it."""
    for option in reversed(_modes):
        function = option(function)
    return function


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
@click.argument("name", type=TEMPLATE)
@_mode
@output_options
def show(app: App, name: str, mode: str) -> None:
    """Print a template as it is written; save it, edit it, and give its path, with a slash, to `create --template`.

    Example: hvctl template show default > mine.xml && hvctl create web --template ./mine.xml
    """
    from hvctl import templates

    found = templates.get_template(_parse_mode(mode), name, app.host.config.template_folders)
    text = found.path.read_text()
    facts = {"name": found.name, "mode": found.mode.value, "path": str(found.path), "xml": text}
    app.print_result(facts, lambda: click.echo(text, nl=False))


@template.command()
@click.argument("name", type=TEMPLATE)
@_mode
@_set
@output_options
def render(app: App, name: str, mode: str | None, variables: tuple[tuple[str, str], ...]) -> None:
    """Print the definition that a template gives with example values.

    Example: hvctl template render default
    """
    from hvctl.instances import examples

    xml = examples.render_example(app.host, _parse_mode(mode), name, dict(variables))
    facts = {"name": name, "mode": _parse_mode(mode).value, "xml": xml}
    app.print_result(facts, lambda: click.echo(xml, nl=False))


@template.command()
@click.argument("name", type=TEMPLATE)
@_mode
@_set
@output_options
def check(app: App, name: str, mode: str | None, variables: tuple[tuple[str, str], ...]) -> None:
    """Check a template: well-formed, every name known, and valid for libvirt's schema. Exit 7 when it is not.

    Example: hvctl template check ./mine.xml --set vlan=5
    """
    from hvctl.instances import examples

    examples.check(app.host, _parse_mode(mode), name, dict(variables))
    app.print_result({"name": name, "ok": True}, lambda: click.echo(f"{name}: ok"))


def _parse_mode(mode: str | None) -> Mode:
    """The default is here: options that share a parameter have none of their own in older versions of click."""
    return Mode(mode) if mode else Mode.VM
