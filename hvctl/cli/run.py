"""`hvctl run`."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import click

from hvctl.cli.app import App, failure_options
from hvctl.cli.completion import IMAGE
from hvctl.cli.create import parse_wishes
from hvctl.cli.parameters import MOUNT, SIZE, VARIABLE
from hvctl.events import Event, Note
from hvctl.model import AccelChoice, Mode, Spec

if TYPE_CHECKING:
    from hvctl.model import Image


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("image", type=IMAGE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--container/--vm", "as_container", default=None, help="Which (default: an application: a container).")
@click.option("--name", default="", help="The instance's name (default: one that is free).")
@click.option("--env", "-e", "environment", metavar="K=V", type=VARIABLE, multiple=True, help="For an application.")
@click.option("--entrypoint", default=None, help="An application's, in place of its image's; empty: none.")
@click.option("--user", default="", help="An application's, in place of its image's: USER[:GROUP], names or numbers.")
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True)
@click.option("--memory", type=SIZE, default="1GiB", show_default=True, help="512M, 2GiB, ...")
@click.option("--mount", "mounts", metavar="SRC:DST[:ro]", type=MOUNT, multiple=True, help="Share a directory.")
@click.option(
    "--tty/--no-tty",
    "-t/-T",
    default=None,
    help="With or without a terminal (default: with, in a container, when interactive).",
)
@click.option("--interactive", "-i", is_flag=True, hidden=True)  # docker's habit; stdin is always passed on
@click.option("--insecure", is_flag=True, help="Pull without checking the server's certificate.")
@failure_options
def run(app: App, image: str, command: tuple[str, ...], **options: object) -> int:
    """Run a command in an instance of its own, and delete that when it has ended; exits with the command's own code.

    IMAGE is an image, or a source such as docker://registry/app:tag, which is pulled first when it is not here. Options
    stand before it, words after it are the command. hvctl's own failure is 255. stdin is passed on.

    Example: hvctl run docker://alpine:3 -- uname -a
    """
    from hvctl import templates

    templates.begin(Mode.VM if options["as_container"] is False else Mode.CONTAINER)
    from hvctl import run as flow  # beside it
    from hvctl.instances.create import Request

    app.host.require_root("run")
    found = _get_image(app, image, is_insecure=bool(options["insecure"]))
    is_application = flow.is_application(found)
    as_container = is_application if options["as_container"] is None else options["as_container"]
    words = command[1:] if command[:1] == ("--",) else command
    spec = Spec(
        name=str(options["name"] or f"run-{secrets.token_hex(3)}"),
        mode=Mode.CONTAINER if as_container else Mode.VM,
        image=found.name,
        cpus=int(str(options["cpus"])),
        memory_bytes=int(str(options["memory"])),
        mounts=tuple(options["mounts"]),  # type: ignore[arg-type]
        accel=AccelChoice.AUTO,
    )
    wishes = parse_wishes({**options, "command": words if is_application else ()})
    tty = None if options["tty"] is None else bool(options["tty"])
    request = flow.Request(create=Request(spec=spec, wishes=wishes), command=words, with_terminal=tty)
    return flow.run(app.host, request)


def _get_image(app: App, source: str, *, is_insecure: bool) -> Image:
    """The image of this name, or from this source, pulled now where it is not here."""
    from hvctl import images

    with app.progress() as events:

        def tell(event: Event) -> None:
            if not isinstance(event, Note):  # our stderr is the command's
                events(event)

        return images.get_or_bring(app.host, source, is_insecure=is_insecure, events=tell)
