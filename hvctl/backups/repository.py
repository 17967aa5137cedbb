"""What a repository of backups is: content that is kept once, and manifests; a directory, or one of restic's.

Nothing in it is believed: manifests are parsed by `manifest.py`, content is hashed as it comes back.
"""

from __future__ import annotations

import contextlib
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from hvctl.backups import manifest
from hvctl.backups.manifest import Backup, Part
from hvctl.errors import CommandFailed, HvctlError, InvalidSpec, NotFound
from hvctl.events import Progress, Sink
from hvctl.host import Host
from hvctl.hostside import files, refusal, transfer
from hvctl.hostside.transfer import Moved, Source
from hvctl.values import dataclass

_TIMEOUT_S = 7 * 86400


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A manifest in a repository: the backup, or why it is none."""

    id: str
    name: str
    """Of the instance, as the repository has it."""
    backup: Backup | None
    problem: str = ""


class Repository(ABC):
    """One repository. `text` is how its user names it."""

    def __init__(self, host: Host, text: str) -> None:
        self.host = host
        self.text = text

    def command(self, words: str) -> str:
        """A command on this repository, to be typed: `hvctl backup list --repo ...`."""
        return f"hvctl backup {words} --repo {shlex.quote(self.text)}"

    @abstractmethod
    def make(self) -> bool:
        """Make it where there is none; whether that was so. Raises HostError, AlreadyExists for something else there."""

    @abstractmethod
    def check(self) -> None:
        """Raise NotFound when there is no repository, Unsupported for a newer one, HostError."""

    @abstractmethod
    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Hold others off who would change it from this host. Raises WrongState when they do not end in time."""

    @abstractmethod
    def read_manifests(self) -> Iterator[tuple[str, str, bytes | str]]:
        """Name and identifier of each backup, oldest first, and its manifest, or (text) why there is none."""

    @abstractmethod
    def write_manifest(self, backup: Backup, content: bytes) -> None:
        """Add a backup: from here on it is one. It is there whole or not at all."""

    @abstractmethod
    def remove_manifest(self, entry: Entry) -> None:
        """Take a backup away; its content stays. Fine when it is gone."""

    @abstractmethod
    def has(self, part: Part) -> bool:
        """Whether content is there, by its name alone."""

    @abstractmethod
    def plan(self, token: str) -> tuple[list[str], Path | None]:
        """The program that takes content in, and the file that its output goes to."""

    @abstractmethod
    def keep(self, token: str, moved: Moved) -> str:
        """Give content that was taken in its place, and say which."""

    @abstractmethod
    def reader(self, part: Part) -> list[str]:
        """The program that prints content. Raises InvalidSpec when it is not there."""

    @abstractmethod
    def collect(self, used: Iterable[Part]) -> int:
        """Remove what no backup uses, and what an interrupted one left; how many things."""

    @abstractmethod
    def find_free_bytes(self) -> int | None:
        """What may still be written there; None where that cannot be asked."""

    def list_entries(self, name: str = "") -> list[Entry]:
        """The backups in it (of one instance), oldest first, the damaged ones too."""
        self.check()
        found = []
        for of, identifier, content in self.read_manifests():
            if name in ("", of):
                found.append(_parse(of, identifier, content))
        return sorted(found, key=lambda entry: (entry.id, entry.name))

    def get(self, text: str) -> Entry:
        """The backup that `NAME@ID` (the ID's beginning will do) or `NAME`, its latest, stands for. Raises NotFound."""
        name, _at, identifier = text.partition("@")
        entries = self.list_entries(name)
        found = [entry for entry in entries if entry.id.startswith(identifier)]
        if not found:
            what = f"no backup {text[:80]!r}" if entries else f"no backup of {name[:80]!r}"
            raise NotFound(f"there is {what} in {self.text!r}", hint=self.command("list"))
        if identifier and len(found) > 1:
            raise InvalidSpec(f"{text!r} stands for {len(found)} backups", hint=self.command(f"list {name}"))
        return found[-1]

    def get_backup(self, text: str) -> Backup:
        """As `get`, but a whole manifest. Raises InvalidSpec for one that is damaged."""
        entry = self.get(text)
        if entry.backup is None:
            raise InvalidSpec(
                f"backup {entry.name}@{entry.id} is damaged: {entry.problem}", hint=self.command(f"list {entry.name}")
            )
        return entry.backup

    def store(self, source: Source, part: Part, scratch: Path, events: Sink, subject: str) -> tuple[Part, int]:
        """Take content in: its part, complete, and how many things of it had to be left out. Raises HostError."""
        import secrets

        token = secrets.token_hex(16)
        program, target = self.plan(token)
        call = self.host.shell.call
        call(files.make_directory, scratch, 0o700)
        try:
            words = transfer.store_command(source, scratch, program, target)
            tell = self._teller(events, subject, f"storing {part.name}", part.size_bytes)
            moved = transfer.parse(self.host.shell.run(words, timeout_s=_TIMEOUT_S, on_line=tell).text)
            place = self.keep(token, moved)
        except BaseException:
            if target is not None:
                call(files.remove, target)
            raise
        finally:
            call(files.remove, scratch)
        return replace(part, sha256=moved.sha256, size_bytes=moved.size_bytes, place=place), moved.left_out

    def load(self, part: Part, target: Path | None, events: Sink, subject: str) -> None:
        """Bring content back into a new file, or only look whether it is sound (None).

        Raises InvalidSpec when it is damaged or missing, HostError when that could not be found out.
        """
        words = transfer.load_command(self.reader(part), target, part.size_bytes)
        what = "checking" if target is None else "reading"
        tell = self._teller(events, subject, f"{what} {part.name}", part.size_bytes)
        try:
            moved = transfer.parse(self.host.shell.run(words, timeout_s=_TIMEOUT_S, on_line=tell).text)
        except CommandFailed as error:
            if error.status != refusal.REFUSED:
                raise
            lines = [line for line in error.stderr.splitlines() if not line.startswith(refusal.PROGRESS)]
            raise self.damaged(part, "; ".join(lines[-2:])[:300]) from error
        if (moved.size_bytes, moved.sha256) != (part.size_bytes, part.sha256):
            raise self.damaged(part, "its content is another than when it was stored")

    def damaged(self, part: Part, reason: str) -> InvalidSpec:
        """The error for content that is not what it should be."""
        return InvalidSpec(
            f"{part.name} ({part.sha256[:12]}) in {self.text!r} is damaged: {reason}",
            hint=f"see what else is: {self.command('verify')}",
        )

    def _teller(self, events: Sink, subject: str, task: str, total_bytes: int) -> Callable[[str], None]:
        def on_line(line: str) -> None:
            self.host.pause(0)
            done = line.removeprefix(refusal.PROGRESS)
            if done != line and done.isdigit():
                events(Progress(subject, task, int(done), total_bytes, is_bytes=True))

        return on_line


def _parse(name: str, identifier: str, content: bytes | str) -> Entry:
    if isinstance(content, str):
        return Entry(id=identifier, name=name, backup=None, problem=content)
    try:
        backup = manifest.parse_backup(content, f"{name}@{identifier}")
        if (backup.name, backup.id) != (name, identifier):
            raise InvalidSpec(f"it is the manifest of {backup.name}@{backup.id}")
    except HvctlError as error:
        return Entry(id=identifier, name=name, backup=None, problem=error.message)
    return Entry(id=identifier, name=name, backup=backup)
