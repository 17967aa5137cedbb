"""`hvctl image build | pull | import | catalogue | list | show | delete | prune`."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hvctl.cli.app import App, confirm, output_options
from hvctl.cli.parameters import SIZE
from hvctl.cli.present import format_age
from hvctl.errors import UsageError
from hvctl.model import Firmware, Provision
from hvctl.units import format_size

if TYPE_CHECKING:
    from hvctl.images import Listed, Wanted

_SCHEME = re.compile(r"[a-z][a-z0-9+-]{1,20}:")


@click.group()
def image() -> None:
    """Build images, bring them from elsewhere, list and delete them: the read-only starting points of instances.

    Example: hvctl image build debian-12
    """


@image.command()
@click.argument("name")
@click.option("--suite", default="", help="debian-12 or debian-13; without it the name says which.")
@click.option("--package", "packages", metavar="PACKAGE", multiple=True, help="Install this too; may be repeated.")
@click.option("--disk", type=SIZE, default=None, help="Size of the root disk, 10GiB if not said; it takes no space.")
@output_options
def build(app: App, name: str, suite: str, packages: tuple[str, ...], disk: int | None) -> None:
    """Build an image from the Debian mirror that this host uses; takes a minute or two.

    The new image takes over the name; instances keep the image that they were made from.

    Example: hvctl image build web-base --suite debian-12 --package nginx --disk 20GiB
    """
    from hvctl import images
    from hvctl.rootfs import request

    wanted = images.parse_request(
        name, suite=suite, packages=packages, disk_bytes=disk if disk is not None else request.DEFAULT_DISK_BYTES
    )
    with app.progress() as events:
        built = images.build(app.host, wanted, events)
    listed = images.Listed(name=built.name, image=built)
    app.print_result(
        _as_json(listed),
        lambda: click.echo(f"{name}: built, {built.id[:12]}; next: hvctl create web --image {name}"),
    )


@image.command()
@click.argument("source")
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
@click.argument("source", metavar="FILE|URL")
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
    """Make an image of a disk (qcow2, raw; also .xz .gz .zst .bz2) or of a root tree (tar or squashfs).

    What it is, the content says. A disk runs as a VM and is set up by cloud-init; a tree with an init runs as a
    container, entered by `hvctl exec` where it has no cloud-init. Read by confined programs only.

    Example: hvctl image import ./noble.img --name noble --user ubuntu
    """
    from hvctl import images

    wanted = images.Wanted(
        name=name,
        source=source if _SCHEME.match(source) else os.path.abspath(source),
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
        [_as_json(item) for item in found],
        lambda: app.print_table(
            ("NAME", "ID", "OS", "KERNEL", "DISK", "SIZE", "USED BY", "AGE"), [_as_row(item) for item in found]
        ),
    )


@image.command()
@click.argument("name")
@output_options
def show(app: App, name: str) -> None:
    """Show everything about one image.

    Example: hvctl image show debian-12
    """
    from hvctl import images

    item = images.get(app.host, name)
    app.print_result(_as_json(item), lambda: app.print_pairs(_as_pairs(item)))


@image.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
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
    option = "" if brought.disk is not None else " --container"
    app.print_result(
        _as_json(listed),
        lambda: click.echo(
            f"{wanted.name}: {brought.id[:12]}, {brought.os} {brought.version}".rstrip()
            + f"; next: hvctl create web --image {wanted.name}{option}"
        ),
    )


def _name_of(source: str) -> str:
    """What an image is called when the user does not say: the catalogue's name, or `images-debian-12`."""
    if source.startswith("images:"):
        return source.lower().replace(":", "-").replace("/", "-")
    if _SCHEME.match(source) or "/" in source:
        raise UsageError(f"{source[:100]!r} does not say what it is to be called", hint="add --name NAME")
    return source


def _as_json(item: Listed) -> dict[str, object]:
    """An image for programs. Names here are part of the interface: add, never rename."""
    found = item.image
    if found is None:
        return {"name": item.name, "problem": item.problem}
    return {
        "name": item.name,
        "id": found.id,
        "os": found.os,
        "version": found.version,
        "architecture": found.architecture,
        "created_at": found.created_at,
        "login_user": found.login_user,
        "provision": found.provision.value,
        "kernel": found.kernel_release,
        "kernel_arguments": list(found.kernel_arguments),
        "disk_bytes": found.disk.virtual_bytes if found.disk else 0,
        "size_bytes": item.size_bytes,
        "has_disk": found.disk is not None,
        "has_tree": found.has_tree,
        "firmware": found.firmware.value,
        "source": found.source,
        "origin": found.origin,
        "packages": list(found.packages),
        "users": list(item.users),
        "problem": "",
    }


def _as_row(item: Listed) -> tuple[str, ...]:
    found = item.image
    if found is None:
        return (item.name, "damaged", "-", "-", "-", "-", "-", "-")
    return (
        item.name,
        found.id[:12],
        f"{found.os} {found.version}",
        found.kernel_release or "-",
        format_size(found.disk.virtual_bytes) if found.disk else "-",
        format_size(item.size_bytes),
        ", ".join(item.users) or "-",
        format_age(found.created_at),
    )


def _as_pairs(item: Listed) -> list[tuple[str, str]]:
    found = item.image
    assert found is not None
    digests = [(part.file, part.sha256) for part in (found.kernel, found.initrd) if part is not None]
    if found.disk is not None:
        digests.insert(0, (found.disk.artefact.file, found.disk.artefact.sha256))
    kinds = [kind for kind, has in (("vm", found.disk is not None), ("container", found.has_tree)) if has]
    return [
        ("name", item.name),
        ("id", found.id),
        ("os", f"{found.os} {found.version} ({found.architecture})"),
        ("runs as", ", ".join(kinds)),
        ("login", found.login_user if found.provision is not Provision.NONE else "by exec only: no cloud-init"),
        ("kernel", found.kernel_release),
        ("arguments", " ".join(found.kernel_arguments)),
        ("disk", format_size(found.disk.virtual_bytes) if found.disk else ""),
        ("size", format_size(item.size_bytes)),
        ("firmware", found.firmware.value if found.disk and not found.kernel else ""),
        ("source", found.source),
        ("packages", " ".join(found.packages)),
        ("used by", ", ".join(item.users)),
        ("created", f"{found.created_at} ({format_age(found.created_at)} ago)"),
        *(("sha256", f"{digest}  {file}") for file, digest in digests),
    ]
