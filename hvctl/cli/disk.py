"""`hvctl disk list | add | remove | resize | set | move | delete`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from hvctl.cli.app import App, Group, confirm, output_options, yes_option
from hvctl.cli.completion import DISK, INSTANCE
from hvctl.cli.parameters import LIMIT, SIZE
from hvctl.errors import UsageError
from hvctl.model import EXT4, Cache, DataDisk, DiskKind, Instance, Throttle, VolumeFormat
from hvctl.units import format_size

if TYPE_CHECKING:
    from hvctl.backends import DiskRequest
    from hvctl.instances.disks import Added
    from hvctl.instances.volumes import Volume

_COLUMNS = ("INSTANCE", "DISK", "SIZE", "FORMAT", "SEEN AS", "SERIAL", "SOURCE")


@click.group(cls=Group)
def disk() -> None:
    """Data disks and volumes, and the size of root disks."""


@disk.command("list")
@click.argument("names", metavar="[INSTANCE...]", type=INSTANCE, nargs=-1)
@click.option("--unattached", is_flag=True, help="Volumes that no instance has.")
@output_options
def list_(app: App, names: tuple[str, ...], unattached: bool) -> None:
    """List the disks of all instances or of some, or the volumes that nobody has.

    Example: hvctl disk list web
    """
    from hvctl.instances import disks, query, volumes

    if unattached:
        if names:
            raise UsageError("an unattached volume is no instance's", hint="hvctl disk list --unattached")
        _print_unattached(app, volumes.list_unattached(app.host))
        return
    instances = [query.get(app.host, name) for name in names] if names else query.list_instances(app.host)
    found = [(instance, disk_) for instance in instances for disk_ in disks.list_disks(app.host, instance)]

    def for_people() -> None:
        if found:
            app.print_table(_COLUMNS, [_row(instance, disk_) for instance, disk_ in found])
        else:
            click.echo("no instances yet; next: hvctl create NAME", err=True)

    app.print_result([as_json(disk_, instance.name) for instance, disk_ in found], for_people)


@disk.command()
@click.argument("instance", type=INSTANCE)
@click.argument("name")
@click.option(
    "--size", type=SIZE, help="Make a volume of this size: 512M, 20G. A container's may be without: a directory."
)
@click.option("--format", "format_", type=click.Choice([kind.value for kind in VolumeFormat]), help="Of a new volume.")
@click.option("--filesystem", type=click.Choice([EXT4]), help="Make one on it (a container's always has one).")
@click.option("--volume", default="", help="Take a volume that nobody has: its name or identifier.")
@click.option("--device", default="", help="Take a block device of the host: never deleted.")
@click.option("--iso", default="", help="Take an ISO image, as a read-only disk: never deleted.")
@click.option("--target", default="", help="Where a container sees it (default: where one saw it, or /srv/NAME).")
@click.option("--serial", default="", help="A VM finds it at /dev/disk/by-id/virtio-SERIAL (default: NAME).")
@click.option("--read-only", is_flag=True)
@click.option("--cache", type=click.Choice([cache.value for cache in Cache]), default="default", show_default=True)
@click.option("--discard/--no-discard", default=True, show_default=True, help="Give freed blocks back to the host.")
@click.option("--iops", type=click.IntRange(0), default=0, help="At most so many operations a second.")
@click.option("--rate", type=SIZE, default=0, help="At most so many bytes a second: 50M.")
@click.option("--trust", is_flag=True, help="Let the host's kernel mount, for a container, what a VM has written.")
@output_options
def add(app: App, instance: str, name: str, volume: str, **options: Any) -> None:
    """Give an instance a disk, running or not.

    Without --volume, --device or --iso a volume is made. A container sees it as a directory.

    Example: hvctl disk add web data --size 20G
    """
    from hvctl.instances import disks

    request = _parse(name, options)
    with app.progress() as events:
        added = disks.add(app.host, instance, request, volume=volume, events=events)
    _print_added(app, instance, added)


@disk.command()
@click.argument("instance", type=INSTANCE)
@click.argument("name", type=DISK)
@click.option("--keep", is_flag=True, help="Keep the volume, for another instance.")
@click.option("--force", is_flag=True, help="Also when the guest has it mounted: what is not written yet is lost.")
@yes_option
@output_options
def remove(app: App, instance: str, name: str, keep: bool, force: bool, yes: bool) -> None:
    """Take a disk away, and delete it with all data if it is a volume. Devices and ISO images stay as they are.

    Example: hvctl disk remove web data --keep
    """
    from hvctl.instances import diskeffects, disks, query

    found = diskeffects.find_disk(query.get(app.host, instance).record, name) if not (yes or keep) else None
    if found is not None and found.kind is DiskKind.VOLUME:
        confirm(app, f"Delete {name} of {instance} with all data?", yes=yes)
    with app.progress() as events:
        removed = disks.remove(app.host, instance, name, keep=keep, force=force, events=events)
    what = "removed"
    if removed.kind is DiskKind.VOLUME:
        again = f"hvctl disk add INSTANCE {name} --volume {removed.volume[:8]}"
        what = f"removed and kept; next: {again}" if keep else "removed and deleted"
    app.print_result(as_json(removed, ""), lambda: click.echo(f"{instance}: {name} {what}"))


@disk.command()
@click.argument("instance", type=INSTANCE)
@click.argument("name", type=DISK)
@click.argument("size", type=LIMIT)
@output_options
def resize(app: App, instance: str, name: str, size: int) -> None:
    """Make a disk larger; NAME `root` is the root, whose file system grows too (in images that hvctl builds).

    Of a container `root` is what it may write to its root: more or less than before, a first limit, or `none`.

    Example: hvctl disk resize web root 40G
    """
    from hvctl.instances import disks

    with app.progress() as events:
        grown = disks.resize(app.host, instance, name, size, events)

    def for_people() -> None:
        has = format_size(grown.size_bytes) if grown.size_bytes else "no limit"
        text = f"{instance}: {name} has {has}" + ("" if grown.has_changed else " already")
        if grown.is_grown_inside:
            text += ", and so has the file system in it" if grown.size_bytes else ""
        elif grown.disk is None:
            text += "; the file system in it grows at the next boot, if it is an image of hvctl's"
        else:
            tool = "resize2fs " if grown.disk.filesystem == EXT4 else ""
            text += f"; grow what is on it inside: {tool}/dev/disk/by-id/virtio-{grown.disk.serial}"
        click.echo(text)

    fields = {"instance": instance, "disk": name, "size_bytes": grown.size_bytes, "changed": grown.has_changed}
    app.print_result({**fields, "grown_inside": grown.is_grown_inside}, for_people)


@disk.command("set")
@click.argument("instance", type=INSTANCE)
@click.argument("name", type=DISK)
@click.option("--iops", type=click.IntRange(0), default=0, help="At most so many operations a second; 0: no limit.")
@click.option("--rate", type=SIZE, default=0, help="At most so many bytes a second: 50M; without: no limit.")
@output_options
def set_(app: App, instance: str, name: str, iops: int, rate: int) -> None:
    """Limit what a disk may do in a second, from now on; NAME `root` is the root. Without options: no limits.

    Example: hvctl disk set web root --iops 500 --rate 50M
    """
    from hvctl.instances import disks

    with app.progress() as events:
        disks.throttle(app.host, instance, name, Throttle(iops=iops, bytes_per_s=rate), events)
    limits = [f"{iops} operations"] * bool(iops) + [format_size(rate)] * bool(rate)
    text = f"at most {' and '.join(limits)} a second" if limits else "no limits"
    fields = {"instance": instance, "disk": name, "iops": iops, "bytes_per_s": rate}
    app.print_result(fields, lambda: click.echo(f"{instance}: {name} has {text}"))


@disk.command()
@click.argument("instance", type=INSTANCE)
@click.argument("name", type=DISK)
@click.argument("to", type=INSTANCE)
@click.option("--as", "new_name", default="", help="What it is called there (default: the same).")
@click.option("--target", default="", help="Where a container sees it (default: where one saw it, or /srv/NAME).")
@click.option("--trust", is_flag=True, help="Let the host's kernel mount, for a container, what a VM has written.")
@output_options
def move(app: App, instance: str, name: str, to: str, new_name: str, target: str, trust: bool) -> None:
    """Take a volume from one instance, which has it or was the last to have it, and give it to another, with its data.

    Example: hvctl disk move web data db
    """
    from hvctl.backends import DiskRequest
    from hvctl.instances import disks

    request = DiskRequest(name=new_name or name, target=target, is_trusted=trust)
    with app.progress() as events:
        added = disks.move(app.host, instance, name, to, request, events)
    _print_added(app, to, added)


@disk.command()
@click.argument("volume")
@yes_option
@output_options
def delete(app: App, volume: str, yes: bool) -> None:
    """Delete a volume that no instance has, by its name or identifier.

    Example: hvctl disk delete data
    """
    from hvctl.instances import disks, volumes

    found = volumes.get_unattached(app.host, volume)
    confirm(app, f"Delete volume {found.disk.name} (last of {found.last_owner}) with all data?", yes=yes)
    deleted = disks.delete_volume(app.host, found.id)
    app.print_result(as_json(deleted.disk, ""), lambda: click.echo(f"{deleted.disk.name}: deleted"))


def as_json(disk_: DataDisk, instance: str) -> dict[str, object]:
    """A disk for programs. Names here are part of the interface: add, never rename."""
    return {
        "instance": instance or None,
        "name": disk_.name,
        "kind": disk_.kind.value,
        "format": disk_.format.value,
        "volume": disk_.volume or None,
        "source": disk_.source or None,
        "size_bytes": disk_.size_bytes or None,
        "filesystem": disk_.filesystem or None,
        "guest_written": disk_.is_guest_written,
        "target": disk_.target or None,
        "serial": disk_.serial or None,
        "read_only": disk_.is_read_only,
        "cache": disk_.cache.value,
        "discard": disk_.has_discard,
        "iops": disk_.throttle.iops or None,
        "bytes_per_s": disk_.throttle.bytes_per_s or None,
    }


def _parse(name: str, options: dict[str, Any]) -> DiskRequest:
    """The options as a frozen request; nobody reads options later."""
    from hvctl.backends import DiskRequest

    return DiskRequest(
        name=name,
        size_bytes=options["size"] or 0,
        format=VolumeFormat(options["format_"]) if options["format_"] else None,
        filesystem=options["filesystem"] or "",
        device=options["device"],
        iso=os.path.abspath(options["iso"]) if options["iso"] else "",
        target=options["target"],
        serial=options["serial"],
        is_read_only=options["read_only"],
        is_trusted=options["trust"],
        cache=Cache(options["cache"]),
        has_discard=options["discard"],
        throttle=Throttle(iops=options["iops"], bytes_per_s=options["rate"]),
    )


def _print_unattached(app: App, found: list[Volume]) -> None:
    rows = [(item.disk.name, item.id[:8], _size(item.disk), _format(item.disk), item.last_owner) for item in found]
    fields = [{**as_json(item.disk, ""), "last_owner": item.last_owner} for item in found]

    def for_people() -> None:
        if rows:
            app.print_table(("VOLUME", "ID", "SIZE", "FORMAT", "LAST OF"), rows)
        else:
            click.echo("every volume has its instance", err=True)

    app.print_result(fields, for_people)


def _print_added(app: App, instance: str, added: Added) -> None:
    found = added.disk
    where = f"/dev/disk/by-id/virtio-{found.serial}" if found.serial else found.target
    when = "" if added.is_live else f" from the next start on: hvctl restart {instance}"
    fields = {**as_json(found, instance), "live": added.is_live}
    app.print_result(fields, lambda: click.echo(f"{instance}: {found.name} is at {where}{when}"))


def _row(instance: Instance, disk_: DataDisk) -> tuple[str, ...]:
    source = "its layers" if disk_.kind is DiskKind.ROOT else disk_.source or f"volume {disk_.volume[:8]}"
    return (instance.name, disk_.name, _size(disk_), _format(disk_), disk_.target, disk_.serial or "-", source)


def _size(disk_: DataDisk) -> str:
    return format_size(disk_.size_bytes) if disk_.size_bytes else "-"


def _format(disk_: DataDisk) -> str:
    kind = disk_.kind.value if disk_.kind in (DiskKind.ISO, DiskKind.DEVICE) else disk_.format.value
    notes = [disk_.filesystem] * bool(disk_.filesystem) + ["read-only"] * disk_.is_read_only
    return ", ".join([kind, *notes])
