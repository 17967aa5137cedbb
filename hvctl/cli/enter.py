"""`hvctl ssh`, `exec` and `console`."""

from __future__ import annotations

import shlex
import sys

import click

from hvctl.cli.app import App, failure_options
from hvctl.cli.completion import INSTANCE
from hvctl.errors import UsageError

_PASS_ON = {"allow_interspersed_args": False}
"""What comes after the name belongs to the command."""


@click.command(context_settings=_PASS_ON)
@click.argument("name", type=INSTANCE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--user", "-u", default="", help="Log in as this user (default: the image's).")
@click.option(
    "--tty/--no-tty", "-t/-T", default=None, help="With or without a terminal (default: with, when interactive)."
)
@failure_options
def ssh(app: App, name: str, command: tuple[str, ...], user: str, tty: bool | None) -> int:
    """Log in, or run a command, over ssh; exits with the command's own code, 255 is hvctl's own failure.

    One word after -- is a shell line, several are passed on as they are.

    Example: hvctl ssh web -- 'uname -a; uptime'
    """
    if "@" in name:
        user, _at, name = name.rpartition("@")
        raise UsageError(
            "the user is an option, as the name comes alone", hint=f"hvctl ssh -u {shlex.quote(user)} {name}"
        )
    from hvctl.access import ssh as client
    from hvctl.instances import query

    endpoint = query.get_endpoint(app.host, name, user=user)
    app.close()
    return client.run(endpoint, _words(command), with_terminal=tty)


@click.command("exec", context_settings=_PASS_ON)
@click.argument("name", type=INSTANCE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--tty/--no-tty",
    "-t/-T",
    default=None,
    help="With or without a terminal (default: with, in a container, when interactive).",
)
@click.option("--interactive", "-i", is_flag=True, hidden=True)  # docker's habit; stdin is always passed on
@failure_options
def exec_(app: App, name: str, command: tuple[str, ...], tty: bool | None, interactive: bool) -> int:
    """Run a command as root without the network; exits with the command's own code, 255 is hvctl's own failure.

    The words are passed on as they are, never through a shell. Without any it is root's shell, which in a VM takes its
    commands from stdin alone.

    Example: hvctl exec web -- systemctl status ssh
    """
    from hvctl.instances import enter

    return enter.attach(app.host, name, _words(command), with_terminal=tty)


@click.command()
@click.argument("name", type=INSTANCE)
@click.option("--force", is_flag=True, help="Take the console over from another session.")
@failure_options
def console(app: App, name: str, force: bool) -> None:
    """Attach to the serial console; ^] leaves.

    Example: hvctl console web
    """
    from hvctl.instances import enter

    if sys.stdin.isatty():
        click.echo(f"console of {name}: ^] leaves, Enter shows a prompt", err=True)
    was_left = enter.console(app.host, name, force=force)
    if was_left and sys.stdin.isatty():
        click.echo(err=True)  # the guest's line has no end
    elif not was_left:
        click.echo(f"\r\n{name}: the console has ended: it is off, or somebody took it over", err=True)


def _words(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command without the `--` that sets it off from hvctl's own options."""
    return command[1:] if command[:1] == ("--",) else command
