"""Deleting backups, named ones or those that a schedule no longer keeps; content goes with the last that uses it."""

from __future__ import annotations

from collections.abc import Sequence

from hvctl.backups.create import collect
from hvctl.backups.repository import Entry, Repository
from hvctl.errors import NotFound
from hvctl.instances import schedule
from hvctl.instances.schedule import Keep


def choose(repository: Repository, wanted: Sequence[str], keep: Keep | None = None) -> list[Entry]:
    """The backups that `delete` would delete: each `NAME@ID`; or of each NAME those that `keep` leaves out.

    Raises NotFound for one that is not there.
    """
    if keep is None:
        return [repository.get(text) for text in wanted]
    chosen = []
    for name in wanted:
        entries = [entry for entry in repository.list_entries(name) if entry.backup is not None]
        if not entries:
            raise NotFound(
                f"there is no backup of {name[:80]!r} in {repository.text!r}", hint=repository.command("list")
            )
        taken = tuple((entry.id, entry.backup.time) for entry in entries if entry.backup)
        expired = set(schedule.list_expired(keep, taken))
        chosen += [entry for entry in entries if entry.id in expired]
    return chosen


def delete(repository: Repository, entries: Sequence[Entry]) -> None:
    """Delete backups; their manifests first, so that none is there without its content. Done again, it finishes."""
    repository.host.require_root("backup delete")
    repository.check()
    with repository.writing():
        for entry in entries:
            repository.host.pause(0)
            repository.remove_manifest(entry)
        collect(repository, repository.list_entries())
