"""`hvctl backup init | create | list | verify | restore | delete`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hvctl.cli.app import App, Group, confirm, output_options, yes_option
from hvctl.cli.completion import INSTANCE, TEMPLATE
from hvctl.cli.parameters import MOUNT, SIZE
from hvctl.cli.present import format_age
from hvctl.errors import HvctlError, InvalidSpec, UsageError
from hvctl.events import Sink, ignore
from hvctl.model import Mount, State, Wait
from hvctl.units import format_size

if TYPE_CHECKING:
    from hvctl.backups.manifest import Backup
    from hvctl.backups.repository import Entry, Repository

T = TypeVar("T")


def _repository_options(function: Callable[..., T]) -> Callable[..., T]:
    repository = click.option(
        "--repo", default="", metavar="REPO", help="/DIRECTORY, restic:/PATH, restic:sftp:USER@HOST:/PATH."
    )
    password = click.option(
        "--password-file", default="", metavar="FILE", help="Of a restic repository (or RESTIC_PASSWORD_FILE)."
    )
    return repository(password(function))


@click.group(cls=Group)
def backup() -> None:
    """Back instances up to a directory or a restic repository, verify that, restore them on this host or another.

    The setting `backups` names a repository for all of them.

    Example: hvctl backup init /srv/backups && hvctl backup create web --repo /srv/backups
    """


@backup.command()
@click.argument("repo")
@click.option("--password-file", default="", metavar="FILE", help="Of a restic repository (or RESTIC_PASSWORD_FILE).")
@output_options
def init(app: App, repo: str, password_file: str) -> None:
    """Make a repository. Only that does: a backup never goes to where a disk should have been mounted.

    Example: hvctl backup init restic:/srv/restic --password-file /root/restic.password
    """
    repository = _open(app, repo, password_file)
    app.host.require_root("backup init")
    is_new = repository.make()
    text = "made" if is_new else "is there already"
    app.print_result({"repository": repository.text, "new": is_new}, lambda: _say(app, f"{repository.text}: {text}"))


@backup.command()
@click.argument("names", metavar="NAME...", type=INSTANCE, nargs=-1, required=True)
@click.option("--comment", default="", help="A line to remember it by.")
@click.option("--full", is_flag=True, help="Read and store everything again; mends what is damaged in the repository.")
@click.option("--without-image", is_flag=True, help="Leave out the image: a host that restores it must have that.")
@click.option("--without-volumes", is_flag=True, help="Leave out its data volumes.")
@_repository_options
@output_options
def create(app: App, names: tuple[str, ...], repo: str, password_file: str, **options: Any) -> None:
    """Back instances up, running or not, one after another; what the repository has already is not stored again.

    A running guest's file systems are held still for the moment of a snapshot, not while it is stored. Shared
    directories, devices and the instance's own snapshots are left out. Says nothing where all went well and there is no
    terminal, as cron likes it; the exit code is the first failure's.

    Example: hvctl backup create web db --repo /srv/backups
    """
    from hvctl.backups import create as creation

    repository = _open(app, repo, password_file)
    made: list[Backup] = []

    def work(name: str, events: Sink) -> None:
        wanted = creation.Wanted(
            name=name,
            comment=options["comment"],
            is_full=options["full"],
            with_image=not options["without_image"],
            with_volumes=not options["without_volumes"],
        )
        done = creation.create(app.host, repository, wanted, events)
        made.append(done)
        _say(app, f"{name}: {name}@{done.id} ({done.consistency}), {format_size(done.stored_bytes)} new")

    try:
        _one_by_one(app, names, work)
    finally:
        if app.is_json:
            app.print_result([_as_json(item) for item in made], lambda: None)


@backup.command("list")
@click.argument("names", metavar="[NAME...]", type=INSTANCE, nargs=-1)
@_repository_options
@output_options
def list_(app: App, names: tuple[str, ...], repo: str, password_file: str) -> None:
    """List backups, oldest first; a damaged manifest is listed as such, and is no backup.

    Example: hvctl backup list web --repo /srv/backups
    """
    repository = _open(app, repo, password_file)
    app.host.require_root("backup list")
    entries = [entry for entry in repository.list_entries() if not names or entry.name in names]
    columns = ("BACKUP", "AGE", "MODE", "HOW", "SIZE", "NEW", "HOST", "COMMENT")
    app.print_result(
        [_entry_as_json(entry) for entry in entries],
        lambda: app.print_table(columns, [_row(entry) for entry in entries]),
    )


@backup.command()
@click.argument("backups", metavar="[NAME|NAME@ID...]", nargs=-1)
@_repository_options
@output_options
def verify(app: App, backups: tuple[str, ...], repo: str, password_file: str) -> None:
    """Read and hash everything that backups consist of (all of them, where none is named).

    Exit code 7 when something is damaged; `backup create --full` stores it anew while the instance is there.

    Example: hvctl backup verify web --repo /srv/backups
    """
    from hvctl.backups import verify as verification

    repository = _open(app, repo, password_file)
    with _progress(app) as events:
        found = verification.verify(repository, backups, events)
    facts = [{"name": item.name, "id": item.id, "problems": list(item.problems)} for item in found]

    def for_people() -> None:
        for item in found:
            for problem in item.problems:
                click.echo(f"{item.name}@{item.id}: {problem}", err=True)
            if not item.problems:
                _say(app, f"{item.name}@{item.id}: whole")

    app.print_result(facts, for_people)
    damaged = [item for item in found if item.problems]
    if damaged:
        raise InvalidSpec(
            f"{len(damaged)} of {len(found)} backups are damaged",
            hint=f"while the instances are there: {repository.command('create --full NAME')}",
        )


@backup.command()
@click.argument("source", metavar="NAME|NAME@ID")
@click.argument("name", metavar="[NEW-NAME]", required=False, default="")
@click.option("--no-start", is_flag=True, help="Only make it.")
@click.option("--template", type=TEMPLATE, default="", help="Make its definition from this one (default: its own).")
@click.option("--cpus", type=click.IntRange(1), default=None, help="Other than it had.")
@click.option("--memory", type=SIZE, default=None, help="Other than it had: 512M, 2GiB.")
@click.option("--mount", "mounts", type=MOUNT, multiple=True, metavar="SRC:DST[:ro]", help="As `create` takes it.")
@click.option("--privileged", is_flag=True, help="Let a privileged container be one again.")
@click.option("--without-volumes", is_flag=True, help="Leave out its data volumes.")
@click.option("--trust", is_flag=True, help="Let this host's kernel mount file systems that come with the backup.")
@click.option("--wait", type=click.Choice([wait.value for wait in Wait]), default="ssh", show_default=True)
@click.option("--timeout", type=click.FloatRange(1), default=180, show_default=True, help="Seconds to wait.")
@_repository_options
@output_options
def restore(app: App, source: str, name: str, repo: str, password_file: str, **options: Any) -> None:
    """Make an instance of a backup (of NAME's latest), on this host or another, and start it.

    Under its own name, where nothing of it is left here, it is the same again: ssh host key, machine id, MAC, and its
    address where that is free. Else it gets an identity of its own, as a copy does. The image comes along where this
    host has not got it.

    Example: hvctl backup restore web web-test --repo /srv/backups
    """
    from hvctl.backups import restore as restoring
    from hvctl.cli.present import as_json

    mounts: tuple[Mount, ...] = options["mounts"]
    request = restoring.Request(
        backup=source,
        name=name,
        template=options["template"],
        cpus=options["cpus"],
        memory_bytes=options["memory"],
        mounts=mounts,
        is_privileged=options["privileged"],
        is_trusted=options["trust"],
        with_volumes=not options["without_volumes"],
        start=not options["no_start"],
        wait=Wait(options["wait"]),
        timeout_s=options["timeout"],
    )
    repository = _open(app, repo, password_file)
    with app.progress() as events:
        instance = restoring.restore(app.host, repository, request, events)
    where = f", {instance.record.address}" if instance.record.address else ""
    verb = "ssh" if instance.state is State.RUNNING else "start"
    text = f"{instance.name}: restored from {source}, {instance.state}{where}; next: hvctl {verb} {instance.name}"
    app.print_result(as_json(instance), lambda: click.echo(text))


@backup.command()
@click.argument("backups", metavar="NAME@ID...|NAME...", nargs=-1, required=True)
@click.option("--keep", default="", metavar="daily=7,...", help="Of each NAME: all but those that this keeps.")
@yes_option
@_repository_options
@output_options
def delete(app: App, backups: tuple[str, ...], keep: str, yes: bool, repo: str, password_file: str) -> None:
    """Delete backups; what another one needs stays. With --keep, those that a schedule does not keep, and without asking.

    --keep is as in `hvctl set`: hourly=24,daily=7,weekly=4,monthly=12.

    Example: hvctl backup delete web db --keep daily=7,weekly=4 --repo /srv/backups
    """
    from hvctl.backups import delete as deletion
    from hvctl.instances import schedule

    for text in backups:
        if ("@" in text) == bool(keep):
            hint = f"hvctl backup delete {text}@ID, or with --keep daily=7" if not keep else "give names alone"
            raise UsageError(
                f"which backups of {text!r}?" if not keep else "--keep chooses among all of NAME", hint=hint
            )
    rules = schedule.parse_keep(keep) if keep else None
    if rules == ():
        raise UsageError("--keep none would delete them all", hint="name them: hvctl backup delete NAME@ID")
    repository = _open(app, repo, password_file)
    entries = deletion.choose(repository, backups, rules)
    names = [f"{entry.name}@{entry.id}" for entry in entries]
    if not keep:
        confirm(app, f"Delete {', '.join(names)} for ever?", yes=yes)
    deletion.delete(repository, entries)
    for text in names:
        _say(app, f"{text}: deleted")
    app.print_result([{"name": entry.name, "id": entry.id} for entry in entries], lambda: None)


def _open(app: App, text: str, password_file: str) -> Repository:
    from hvctl.backups.opening import open_repository

    return open_repository(app.host, text, password_file=password_file)


def _say(app: App, text: str) -> None:
    """A line for people who look."""
    if sys.stdout.isatty():
        app.say(text)


def _progress(app: App) -> Any:
    """Notes and progress for people who look; nothing for cron."""
    import contextlib

    if sys.stderr.isatty():
        return app.progress()
    return contextlib.nullcontext(ignore)


def _one_by_one(app: App, names: tuple[str, ...], work: Callable[[str, Sink], None]) -> None:
    """Every name, whatever becomes of the others; the first failure is raised at the end, the others are printed."""
    failures: list[HvctlError] = []
    with _progress(app) as events:
        for name in dict.fromkeys(names):
            app.host.pause(0)
            try:
                work(name, events)
            except HvctlError as error:
                failures.append(error)
                if len(failures) > 1:
                    app.print_error(error)
    if failures:
        raise failures[0]


def _row(entry: Entry) -> tuple[str, ...]:
    item, name = entry.backup, f"{entry.name}@{entry.id}"
    if item is None:
        return (name, "-", "-", "damaged", "-", "-", "-", entry.problem)
    mode, how = item.subject.spec.mode.value, item.consistency.value
    sizes = (format_size(sum(part.size_bytes for part in item.parts)), format_size(item.stored_bytes))
    return (name, format_age(item.created_at), mode, how, *sizes, item.host, item.comment)


def _entry_as_json(entry: Entry) -> dict[str, object]:
    if entry.backup is None:
        return {"name": entry.name, "id": entry.id, "problem": entry.problem}
    return _as_json(entry.backup)


def _as_json(item: Backup) -> dict[str, object]:
    """A backup for programs. Names here are part of the interface: add, never rename."""
    return {
        "name": item.name,
        "id": item.id,
        "created_at": item.created_at,
        "host": item.host,
        "mode": item.subject.spec.mode.value,
        "consistency": item.consistency.value,
        "comment": item.comment,
        "image": item.subject.spec.image,
        "with_image": bool(item.base_parts),
        "size_bytes": sum(part.size_bytes for part in item.parts),
        "stored_bytes": item.stored_bytes,
        "left_out": list(item.left_out),
    }
