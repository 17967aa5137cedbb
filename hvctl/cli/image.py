"""`hvctl image build | pull | import | catalogue | list | show | delete | prune`; build, publish and export are in imagemake."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hvctl.cli import imagemake
from hvctl.cli.app import App, Group, confirm, output_options, yes_option
from hvctl.cli.completion import CATALOGUE, IMAGE
from hvctl.cli.imageview import as_json, as_pairs, as_row
from hvctl.errors import UsageError
from hvctl.model import Firmware

if TYPE_CHECKING:
    from hvctl.images import Wanted

_SCHEME = re.compile(r"[a-z][a-z0-9+-]{1,20}:")


@click.group(cls=Group)
def image() -> None:
    """Build images, bring them from elsewhere, list and delete them: the read-only starting points of instances.

    Example: hvctl image build debian-12
    """


image.add_command(imagemake.build)
image.add_command(imagemake.publish)
image.add_command(imagemake.export)


@image.command()
@click.argument("source", type=CATALOGUE)
@click.option("--name", default="", help="What it is called here (default: from the source).")
@click.option("--sha256", default="", metavar="HEX", help="What must have come, instead of what the publisher says.")
@click.option("--user", default="", help="Who logs in (default: what the catalogue says, or root).")
@click.option("--insecure", is_flag=True, help="Go without checksums or signatures where they are missing.")
@output_options
def pull(app: App, source: str, name: str, sha256: str, user: str, insecure: bool) -> None:
    """Bring an image from elsewhere: verified, resumed where an earlier try ended.

    \b
    SOURCE is one of
      ubuntu-24.04           a name of the catalogue: hvctl image catalogue
      images:debian/12/cloud an image of a simplestreams server (setting `simplestreams`)
      docker://HOST/APP:TAG  an application image of a registry (docker://alpine: Docker's); also oci:DIR[:TAG],
                             oci-archive:FILE, docker-archive:FILE
      https://HOST/PATH      a disk or root tree; with --name, and --sha256 or --insecure

    The same again is only looked up: nothing is fetched twice. The new image takes over the name.

    Example: hvctl image pull ubuntu-24.04 && hvctl create web --image ubuntu-24.04
    """
    from hvctl import images

    wanted = images.Wanted(
        name=name or _name_of(source), source=source, sha256=sha256, is_insecure=insecure, login_user=user
    )
    _bring(app, wanted)


@image.command("import")
@click.argument("source", metavar="FILE|URL|-")
@click.option("--name", required=True, help="What it is called here.")
@click.option("--sha256", default="", metavar="HEX", help="What the file must have.")
@click.option("--user", default="", help="Who logs in (default: root).")
@click.option(
    "--firmware", type=click.Choice([one.value for one in Firmware]), help="What the disk needs (default: bios)."
)
@click.option(
    "--format", "format_", type=click.Choice(["qcow2", "raw"]), help="Of the disk, where it does not say so itself."
)
@click.option("--insecure", is_flag=True, help="Take what an address gives without --sha256.")
@output_options
def import_(app: App, source: str, name: str, format_: str | None, firmware: str | None, **options: Any) -> None:
    """Make an image of a disk (qcow2, raw; also .xz .gz .zst .bz2), of a root tree (tar or squashfs), or of what
    `image export` wrote; `-` reads stdin.

    What it is, the content says. Either runs in both modes: what is missing is made of it when it is first needed. It is
    set up by cloud-init, and entered by `hvctl exec` where it has none. Read by confined programs only.

    Example: hvctl image import ./noble.img --name noble --user ubuntu
    """
    from hvctl import images

    wanted = images.Wanted(
        name=name,
        source=source if source == "-" or _SCHEME.match(source) else os.path.abspath(source),
        sha256=options["sha256"],
        is_insecure=options["insecure"],
        login_user=options["user"],
        firmware=Firmware(firmware) if firmware else None,
        format=format_ or "",
    )
    _bring(app, wanted)


@image.command()
@output_options
def catalogue(app: App) -> None:
    """List the images that `image pull` knows by name, and how far what comes can be trusted.

    `signature`: digests signed by the publisher. `https`: digests that are not signed, so as good as the connection.
    Yours: /etc/hvctl/catalogue.toml, ~/.config/hvctl/catalogue.toml.

    Example: hvctl image catalogue --json
    """
    from hvctl.rootfs import catalogue as entries

    found = entries.load()
    app.print_result(
        [
            {
                "name": entry.name,
                "os": entry.os,
                "version": entry.version,
                "user": entry.user,
                "firmware": entry.firmware.value,
                "verified_by": entry.trust,
                "address": entry.address,
                "checksums": entry.checksums,
                "fingerprints": list(entry.fingerprints),
                "file": str(entry.file),
            }
            for entry in found
        ],
        lambda: app.print_table(
            ("NAME", "OS", "USER", "VERIFIED BY", "ADDRESS"),
            [(one.name, f"{one.os} {one.version}", one.user, one.trust, one.address) for one in found],
        ),
    )


@image.command("list")
@output_options
def list_(app: App) -> None:
    """List images.

    Example: hvctl image list --json
    """
    from hvctl import images

    found = images.list_images(app.host)
    app.print_result(
        [as_json(item) for item in found],
        lambda: app.print_table(
            ("NAME", "ID", "OS", "KERNEL", "DISK", "SIZE", "USED BY", "AGE"), [as_row(item) for item in found]
        ),
    )


@image.command()
@click.argument("name", type=IMAGE)
@output_options
def show(app: App, name: str) -> None:
    """Show everything about one image.

    Example: hvctl image show debian-12
    """
    from hvctl import images

    item = images.get(app.host, name)
    app.print_result(as_json(item), lambda: app.print_pairs(as_pairs(item)))


@image.command()
@click.argument("names", metavar="NAME...", type=IMAGE, nargs=-1, required=True)
@yes_option
@output_options
def delete(app: App, names: tuple[str, ...], yes: bool) -> None:
    """Delete images; refused while an instance stands on one.

    Example: hvctl image delete web-base --yes
    """
    from hvctl import images

    confirm(app, f"Delete {', '.join(names)}?", yes=yes)
    app.for_each(
        names, lambda name, _events: images.delete(app.host, name), lambda name, _none: app.say(f"{name}: deleted")
    )
    app.print_result([{"name": name, "deleted": True} for name in names], lambda: None)


@image.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@output_options
def prune(app: App, dry_run: bool) -> None:
    """Remove what nothing uses: images without a name or an instance, downloads that were interrupted.

    Example: hvctl image prune --dry-run
    """
    from hvctl import images

    found = images.tidy(app.host, dry_run=dry_run)
    verb = "would be removed" if dry_run else "removed"
    app.print_result(
        [{"what": what, "removed": not dry_run} for what in found],
        lambda: click.echo("\n".join(f"{what}: {verb}" for what in found) or "nothing to do"),
    )


def _bring(app: App, wanted: Wanted) -> None:
    """Bring an image, with progress; print what came of it."""
    from hvctl import images

    with app.progress() as events:
        brought = images.bring(app.host, wanted, events)
    listed = images.Listed(name=wanted.name, image=replace(brought, name=wanted.name))
    app.print_result(
        as_json(listed),
        lambda: click.echo(
            f"{wanted.name}: {brought.id[:12]}, {brought.os} {brought.version}".rstrip()
            + f"; next: hvctl create web --image {wanted.name}"
        ),
    )


def _name_of(source: str) -> str:
    """What an image is called when the user does not say: the catalogue's name, `images-debian-12`, `app-1.2`."""
    from hvctl.rootfs import sources

    if source.startswith("images:"):
        return source.lower().replace(":", "-").replace("/", "-")
    if sources.is_application(source):
        return sources.suggest_name(source)
    if _SCHEME.match(source) or "/" in source:
        raise UsageError(f"{source[:100]!r} does not say what it is to be called", hint="add --name NAME")
    return source
