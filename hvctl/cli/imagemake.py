"""`hvctl image publish | export`: images of what is here, and images as files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from hvctl.cli.app import App, output_options
from hvctl.cli.imageview import as_json
from hvctl.errors import UsageError
from hvctl.units import format_size


@click.command()
@click.argument("instance")
@click.option("--name", required=True, help="What the image is called.")
@click.option("--keep-identity", is_flag=True, help="Leave host keys, machine id, host name, logs and the like in it.")
@output_options
def publish(app: App, instance: str, name: str, keep_identity: bool) -> None:
    """Make an image of what an instance has become, for VMs and containers alike.

    It goes on as it was; a running one is held still for a moment, its files written. What makes it that one system is
    left out: ssh host keys, machine id, host name, random seed, cloud-init's state, journal, /tmp. Users, their keys and
    passwords stay.

    Example: hvctl image publish web --name web-base && hvctl create web2 --image web-base --container
    """
    from hvctl import images
    from hvctl.instances.publish import Publication
    from hvctl.instances.publish import publish as publish_instance

    wanted = Publication(instance=instance, image=name, keep_identity=keep_identity)
    with app.progress() as events:
        made = publish_instance(app.host, wanted, events)
    images.prune(app.host)
    app.print_result(
        as_json(images.get(app.host, name)),
        lambda: click.echo(f"{name}: {made.id[:12]}, of {instance}; next: hvctl create NAME --image {name}"),
    )


@click.command()
@click.argument("name")
@click.argument("file", metavar="FILE|-")
@click.option("--full", is_flag=True, help="With disk and tree; else the half that the image came with.")
@output_options
def export(app: App, name: str, file: str, full: bool) -> None:
    """Write an image to one file that any host with hvctl imports, and runs in either mode; `-` is stdout.

    The same image gives the same file. Its members are listed with their digests in the first one, manifest.json.

    Example: hvctl image export web-base web-base.hvctl && hvctl image import web-base.hvctl --name web-base
    """
    from hvctl.rootfs import bundles

    if file == "-" and (sys.stdout.isatty() or app.is_json):
        raise UsageError("that would go to the terminal", hint=f"hvctl image export {name} - > FILE")
    with app.progress() as events:
        if file == "-":
            bundles.send(app.host, name, sys.stdout.fileno(), is_full=full, events=events)
            return
        written = bundles.export(app.host, name, Path(os.path.abspath(file)), is_full=full, events=events)
    app.print_result(
        {"name": name, "file": str(written.path), "size_bytes": written.size_bytes, "sha256": written.sha256},
        lambda: click.echo(
            f"{name}: {format_size(written.size_bytes)} in {file}, sha256 {written.sha256}; "
            f"next, there: hvctl image import {os.path.basename(file)} --name {name}"
        ),
    )
