"""`hvctl create`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hvctl.cli.app import App, output_options
from hvctl.cli.completion import IMAGE, TEMPLATE
from hvctl.cli.parameters import MOUNT, PAIR, SIZE, VARIABLE, WithCommand
from hvctl.cli.present import as_json
from hvctl.errors import InvalidSpec, NotFound, UsageError
from hvctl.events import Note, Sink
from hvctl.model import AccelChoice, Instance, Mode, Provision, Spec, State, Wait

if TYPE_CHECKING:
    from hvctl.instances.create import Request
    from hvctl.rootfs.application import Wishes


@click.command(cls=WithCommand)
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--container", is_flag=True, help="A container instead of a VM, from the same image.")
@click.option("--vm", "as_vm", is_flag=True, help="A VM: so it is without --container, too.")
@click.option("--image", type=IMAGE, help="The image to start from (default: from the settings, debian-12).")
@click.option("--cpus", type=click.IntRange(1), default=2, show_default=True)
@click.option("--memory", type=SIZE, default="1GiB", show_default=True, help="512M, 2GiB, ...")
@click.option("--cpuset", default="", help="The host's CPUs it may run on: 0-3,8 (default: all).")
@click.option("--processes", type=click.IntRange(8), help="Processes and threads a container may have (default: 4096).")
@click.option("--mount", "mounts", metavar="SRC:DST[:ro]", type=MOUNT, multiple=True, help="Share a directory.")
@click.option("--privileged", is_flag=True, help="A container whose root is this host's root.")
@click.option("--disk", type=SIZE, help="Size of the root; of a container: its limit (default: none).")
@click.option(
    "--template",
    type=TEMPLATE,
    default="",
    help="A name from `hvctl template list`, or a file, ./mine.xml (default: what the image needs).",
)
@click.option("--set", "variables", metavar="K=V", type=PAIR, multiple=True, help="A value for the template (vars.K).")
@click.option("--accel", type=click.Choice([choice.value for choice in AccelChoice]), default="auto", show_default=True)
@click.option("--require-kvm", is_flag=True, help="Fail (exit 8) rather than emulate.")
@click.option("--ssh-key", "ssh_keys", multiple=True, help="A public key, or a file with some (default: yours).")
@click.option("--user-data", type=click.Path(path_type=Path), help="cloud-init user data; `-` reads stdin.")
@click.option("--env", "-e", "environment", metavar="K=V", type=VARIABLE, multiple=True, help="For an application.")
@click.option("--entrypoint", default=None, help="An application's, in place of its image's; empty: none.")
@click.option("--user", default="", help="An application's, in place of its image's: USER[:GROUP], names or numbers.")
@click.option("--autostart", is_flag=True, help="Start it when the host boots.")
@click.option("--no-start", is_flag=True, help="Only make it.")
@click.option("--wait", type=click.Choice([wait.value for wait in Wait]), default="ssh", show_default=True)
@click.option("--timeout", type=click.FloatRange(1), default=180, show_default=True, help="Seconds to wait.")
@click.option("--build", is_flag=True, help="Build the image first when it is not there.")
@click.option("--trust-image", is_flag=True, help="Let this host's kernel read the image's file systems (xfs, btrfs).")
@click.option("--print-xml", is_flag=True, help="Print the definition and make nothing.")
@output_options
def create(app: App, names: tuple[str, ...], **options: object) -> None:
    """Make one or more instances from an image, start them and wait until they answer.

    Of an application image, words after -- replace its command.

    Example: hvctl create web db --image debian-12 --cpus 2 --memory 2GiB
    """
    from hvctl import templates

    if options["container"] and options["as_vm"]:
        raise UsageError("an instance is a VM or a container", hint="leave --vm or --container away")
    templates.begin(Mode.CONTAINER if options["container"] else Mode.VM)
    from hvctl.instances import create as verbs  # beside it

    if not options["print_xml"]:
        app.host.require_root("create")
    if not options["image"]:
        _check_names_no_image(app, names)
    options["authorized_keys"] = _read_keys(options)
    options["user_data"] = _read_user_data(options["user_data"])  # type: ignore[arg-type]
    requests = {name: _parse(app, name, options) for name in names}
    if options["print_xml"]:
        found = {name: verbs.format_xml(app.host, verbs.plan_new(app.host, requests[name])) for name in requests}
        listed = [{"name": name, "xml": xml} for name, xml in found.items()]
        app.print_result(listed, lambda: click.echo("".join(found.values()), nl=False))
        return
    if options["build"]:
        _build_missing(app, next(iter(requests.values())).spec.image)
    made: list[Instance] = []

    def work(name: str, events: Sink) -> Instance:
        return verbs.create(app.host, requests[name], events)

    def done(name: str, instance: Instance) -> None:
        made.append(instance)
        where = f", {instance.record.address}" if instance.record.address else ""
        app.say(f"{name}: created, {instance.state}{where}; next: hvctl {_next(instance)}")

    try:
        app.for_each(names, work, done)
    finally:
        if app.is_json and made:
            app.print_result([as_json(instance) for instance in made], lambda: None)


def _check_names_no_image(app: App, names: tuple[str, ...]) -> None:
    """Raise UsageError for IMAGE NAME, which is the order elsewhere, and for one name that is another image's.

    An instance may be called as its own image is, and as any: with `--image`.
    """
    from hvctl.rootfs import published

    def is_here(name: str) -> bool:
        with contextlib.suppress(InvalidSpec):
            return published.find_id(app.host, name) is not None
        return False

    image = next((name for name in names if is_here(name)), None)
    if not image and len(names) > 1:
        image = _find_known(names)
    if image and names != (app.host.config.image,):
        others = " ".join(shlex.quote(name) for name in names if name != image) or "NAME"
        raise UsageError(
            f"{image!r} is an image, and what stands here is what instances are to be called (so may one, with --image)",
            hint=f"hvctl create {others} --image {shlex.quote(image)}",
        )


def _find_known(names: tuple[str, ...]) -> str | None:
    """The first of these that an image could be brought or built from."""
    from hvctl.rootfs import catalogue, request, sources

    known = {entry.name for entry in catalogue.load()}
    return next((one for one in names if one in known or sources.is_source(one) or request.is_buildable(one)), None)


def _parse(app: App, name: str, options: dict[str, object]) -> Request:
    """One name's options as a frozen request; nobody reads options later."""
    from hvctl.identity import check_name
    from hvctl.instances.create import Request

    check_name(name)
    spec = Spec(
        name=name,
        mode=Mode.CONTAINER if options["container"] else Mode.VM,
        image=str(options["image"] or app.host.config.image),
        cpus=int(str(options["cpus"])),
        memory_bytes=int(str(options["memory"])),
        disk_bytes=int(str(options["disk"] or 0)),
        template=str(options["template"]),
        variables=tuple(options["variables"]),  # type: ignore[arg-type]
        accel=AccelChoice(str(options["accel"])),
        autostart=bool(options["autostart"]),
        cpuset=str(options["cpuset"]),
        processes=int(str(options["processes"] or 0)),
        is_privileged=bool(options["privileged"]),
        mounts=tuple(options["mounts"]),  # type: ignore[arg-type]
    )
    return Request(
        spec=spec,
        authorized_keys=options["authorized_keys"],  # type: ignore[arg-type]
        user_data=options["user_data"],  # type: ignore[arg-type]
        wishes=parse_wishes(options),
        require_kvm=bool(options["require_kvm"]),
        trust_image=bool(options["trust_image"]),
        start=not options["no_start"],
        wait=Wait(str(options["wait"])),
        timeout_s=float(str(options["timeout"])),
    )


def parse_wishes(options: dict[str, object]) -> Wishes:
    """What an application is to run otherwise than its image says, from `environment`, `entrypoint` and `command`."""
    from hvctl.rootfs.application import Wishes

    entrypoint = options["entrypoint"]
    return Wishes(
        environment=tuple(options["environment"]),  # type: ignore[arg-type]
        entrypoint=None if entrypoint is None else (str(entrypoint),) if entrypoint else (),
        command=tuple(options["command"]),  # type: ignore[arg-type]
        user=str(options["user"]),
    )


def _read_keys(options: dict[str, object]) -> tuple[str, ...]:
    from hvctl.access import keys

    return keys.find_public_keys(options["ssh_keys"])  # type: ignore[arg-type]


def _read_user_data(path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise NotFound(f"cannot read the user data {str(path)!r}: {error.strerror}", hint="--user-data FILE") from error
    if not content:
        raise UsageError(f"the user data {str(path)!r} is empty", hint="leave --user-data away")
    return content


def _build_missing(app: App, image: str) -> None:
    from hvctl import images
    from hvctl.rootfs import published
    from hvctl.rootfs.request import parse_request

    if published.find_image(app.host, image) is None:
        with app.progress() as events:
            events(Note(image, "there is no such image yet: building it"))
            images.build(app.host, parse_request(image), events)


def _next(instance: Instance) -> str:
    name = instance.name
    if instance.record.is_application:
        return f"logs {name}"
    if instance.state is not State.RUNNING:
        return f"start {name}"
    can_log_in = instance.record.address and instance.record.provision is not Provision.NONE
    return f"ssh {name}" if can_log_in else f"exec {name} -- COMMAND"
