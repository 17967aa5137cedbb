"""`hvctl image build | list | show | delete`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hvctl.cli.app import App, confirm, output_options
from hvctl.cli.parameters import SIZE
from hvctl.cli.present import format_age
from hvctl.units import format_size

if TYPE_CHECKING:
    from hvctl.images import Listed


@click.group()
def image() -> None:
    """Build, list, show and delete images: the read-only starting points of instances.

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
        ("login", found.login_user),
        ("kernel", found.kernel_release),
        ("arguments", " ".join(found.kernel_arguments)),
        ("disk", format_size(found.disk.virtual_bytes) if found.disk else ""),
        ("size", format_size(item.size_bytes)),
        ("packages", " ".join(found.packages)),
        ("used by", ", ".join(item.users)),
        ("created", f"{found.created_at} ({format_age(found.created_at)} ago)"),
        *(("sha256", f"{digest}  {file}") for file, digest in digests),
    ]
