"""`hvctl image build | publish | export`: images of what is here, and images as files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from hvctl.cli.app import App, output_options
from hvctl.cli.completion import IMAGE, INSTANCE
from hvctl.cli.imageview import as_json
from hvctl.cli.parameters import SIZE
from hvctl.errors import UsageError
from hvctl.units import format_size


@click.command()
@click.argument("what", metavar="NAME|DIRECTORY")
@click.option("--suite", default="", help="debian-12 or debian-13; without it the name says which.")
@click.option("--package", "packages", metavar="PACKAGE", multiple=True, help="Install this too; may be repeated.")
@click.option("--disk", type=SIZE, default=None, help="Size of the root disk, 10GiB if not said; it takes no space.")
@click.option("-f", "--file", metavar="CONTAINERFILE", default="", help="Do what this file says, in DIRECTORY.")
@click.option("--name", default="", help="With -f: what the image is called.")
@click.option(
    "--network", type=click.Choice(["none", "host"]), default=None, help="With -f: what RUN is on; none if not said."
)
@output_options
def build(app: App, what: str, file: str, name: str, **options: Any) -> None:
    """Build an image: NAME from the Debian mirror that this host uses, or what a Containerfile says, by buildah.

    A Containerfile may be FROM an image that is here, `hvctl/NAME`: FROM a whole system it makes one again, unless it
    sets ENTRYPOINT or CMD. Its RUN commands are done as this host's root, in a chroot without a network: those that fetch
    something need --network host. The new image takes over the name; instances keep the image that they were made from.

    Example: hvctl image build web-base --suite debian-12 --package nginx --disk 20GiB; or: hvctl image build -f
    Containerfile . --name web
    """
    from hvctl import images

    is_recipe, network = bool(file), options.pop("network")
    if network and not is_recipe:
        raise UsageError("--network is for a Containerfile", hint="leave it away, or say -f Containerfile")
    if is_recipe != bool(name) or (is_recipe and any(options.values())):
        raise UsageError(
            "-f CONTAINERFILE DIRECTORY --name NAME belong together, without --suite, --package, --disk",
            hint="hvctl image build -f Containerfile . --name web",
        )
    with app.progress() as events:
        if is_recipe:
            paths = [Path(os.path.abspath(path)) for path in (file, what)]
            from hvctl.rootfs.containerfile import Recipe

            recipe = Recipe(name=name, file=paths[0], context=paths[1], has_network=network == "host")
            built = images.build_recipe(app.host, recipe, events)
        else:
            sizes = {"disk_bytes": options["disk"]} if options["disk"] is not None else {}
            wanted = images.parse_request(what, suite=options["suite"], packages=options["packages"], **sizes)
            built = images.build(app.host, wanted, events)
    app.print_result(
        as_json(images.get(app.host, built.name)),
        lambda: click.echo(f"{built.name}: built, {built.id[:12]}; next: hvctl create web --image {built.name}"),
    )


@click.command()
@click.argument("instance", type=INSTANCE)
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
@click.argument("name", type=IMAGE)
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
