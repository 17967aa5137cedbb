"""Whether backups are whole: every manifest read, every content of theirs read and hashed."""

from __future__ import annotations

from collections.abc import Sequence

from hvctl.backups.repository import Entry, Repository
from hvctl.errors import HvctlError, Interrupted, NotFound
from hvctl.events import Sink, ignore
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found of one backup."""

    name: str
    id: str
    problems: tuple[str, ...]
    """Empty: it is whole."""


def verify(repository: Repository, wanted: Sequence[str] = (), events: Sink = ignore) -> tuple[Verified, ...]:
    """Look at backups (`NAME`: all of one instance, `NAME@ID`; none: all); content that several use is read once.

    Raises NotFound for one that is not there. What is damaged is in the result.
    """
    repository.host.require_root("backup verify")
    entries = repository.list_entries()
    chosen = [entry for entry in entries if not wanted or any(_is_meant(entry, text) for text in wanted)]
    for text in wanted:
        if not any(_is_meant(entry, text) for entry in entries):
            raise NotFound(f"there is no backup {text[:80]!r} in {repository.text!r}", hint=repository.command("list"))
    known: dict[tuple[str, str], str] = {}
    return tuple(_verify(repository, entry, known, events) for entry in chosen)


def _is_meant(entry: Entry, text: str) -> bool:
    name, _at, identifier = text.partition("@")
    return entry.name == name and entry.id.startswith(identifier)


def _verify(repository: Repository, entry: Entry, known: dict[tuple[str, str], str], events: Sink) -> Verified:
    if entry.backup is None:
        return Verified(name=entry.name, id=entry.id, problems=(entry.problem,))
    problems = []
    for part in entry.backup.parts:
        key = (part.sha256, part.place)
        if key not in known:
            try:
                repository.load(part, None, events, f"{entry.name}@{entry.id}")
                known[key] = ""
            except Interrupted:
                raise
            except HvctlError as error:
                known[key] = error.message
        if known[key]:
            problems.append(known[key])
    return Verified(name=entry.name, id=entry.id, problems=tuple(problems))
