"""A repository of restic's: content goes into it by stdin, one restic snapshot for each thing, found by a tag of its own.

    hvctl-content, TOKEN             one thing that a backup consists of: the file /TOKEN
    hvctl-backup, NAME, ID           a manifest: the file /manifest.json; made last, forgotten first

restic encrypts, compresses, and stores what it has already only once, in pieces. Its password comes from a file, or from
the environment variables that restic itself reads; it never stands on a command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvctl.backups import manifest
from hvctl.backups.manifest import Backup, Part
from hvctl.backups.repository import Entry, Repository
from hvctl.errors import AlreadyExists, CommandFailed, HostError, HvctlError, InvalidSpec, NotFound, UsageError
from hvctl.host import Host
from hvctl.hostside import files, machine
from hvctl.hostside.transfer import Moved
from hvctl.identity import check_name
from hvctl.values import dataclass

_CONTENT, _BACKUP = "hvctl-content", "hvctl-backup"
_TOKEN = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SNAPSHOT = re.compile(r"[0-9a-f]{64}", re.ASCII)
# ssh takes a host that begins with a hyphen for an option.
_SFTP = re.compile(
    r"sftp:(?:(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*:[^:]+"
    r"|//(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?/.+)",
    re.ASCII,
)
_PASSWORDS = ("RESTIC_PASSWORD_FILE", "RESTIC_PASSWORD_COMMAND", "RESTIC_PASSWORD")
_TIMEOUT_S = 7 * 86400
_LOCK_TIMEOUT_S = 4 * 3600
_MANIFEST = "manifest.json"
_NOT_THERE = ("Is there a repository", "does not exist", "no such file")


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """One of restic's."""

    id: str
    tags: tuple[str, ...]
    host: str


class Restic(Repository):
    """A local path, or one behind sftp."""

    def __init__(self, host: Host, text: str, *, password_file: str = "") -> None:
        super().__init__(host, text)
        self.location = text.removeprefix("restic:")
        self._password_file = password_file
        self._known: list[_Snapshot] | None = None
        is_remote = ":" in self.location.partition("/")[0]
        if is_remote and not _SFTP.fullmatch(self.location):
            raise InvalidSpec(
                f"{text[:100]!r} is no repository that hvctl knows",
                hint="restic:/srv/restic, restic:sftp:USER@HOST:/PATH or restic:sftp://USER@HOST:PORT//PATH",
            )
        if not is_remote:
            self.location = os.path.abspath(self.location)
        self._path = None if is_remote else Path(self.location)

    def command(self, words: str) -> str:
        password = f" --password-file {shlex.quote(self._password_file)}" if self._password_file else ""
        return super().command(words) + password

    def make(self) -> bool:
        self._require()
        if self._path is not None and not self.host.shell.call(files.is_directory, self._path.parent):
            parent = str(self._path.parent)
            raise HostError(f"there is no directory {parent!r}", hint=f"mkdir -p {shlex.quote(parent)}")
        with contextlib.suppress(NotFound):
            self.check()
            return False
        if self._path is not None and self.host.shell.call(files.list_names, self._path):
            raise AlreadyExists(f"{str(self._path)!r} is not empty", hint="name a new or an empty directory")
        self._run("init")
        return True

    def check(self) -> None:
        self._require()
        if self._path is not None and not self.host.shell.call(files.exists, self._path / "config"):
            raise self._not_there()
        if self._path is None or self._known is None:
            self._list()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """By a lock of this host's; restic's own locks keep others from what must not be done at once."""
        name = f"restic.{hashlib.sha256(self.location.encode()).hexdigest()[:16]}"
        with self.host.lock(name, timeout_s=_LOCK_TIMEOUT_S):
            self._known = None
            yield

    def read_manifests(self) -> Iterator[tuple[str, str, bytes | str]]:
        for snapshot in self._list():
            name, identifier = _names_of(snapshot)
            if name:
                try:
                    content: bytes | str = self._read_manifest(snapshot.id)
                except HvctlError as error:
                    content = error.message
                yield name, identifier, content

    def write_manifest(self, backup: Backup, content: bytes) -> None:
        tags = ("--tag", f"{_BACKUP},name={backup.name},id={backup.id}")
        self._run("backup", "--quiet", "--stdin", "--stdin-filename", _MANIFEST, *tags, stdin=content)
        self._known = None

    def remove_manifest(self, entry: Entry) -> None:
        going = [one.id for one in self._list() if _names_of(one) == (entry.name, entry.id)]
        if going:
            self._run("forget", "--quiet", *going)
        self._known = None

    def has(self, part: Part) -> bool:
        return bool(part.place) and any(part.place in one.tags and _CONTENT in one.tags for one in self._list())

    def plan(self, token: str) -> tuple[list[str], Path | None]:
        words = self._words("backup", "--quiet", "--stdin", "--stdin-filename", token, "--tag", f"{_CONTENT},{token}")
        return words, None

    def keep(self, token: str, moved: Moved) -> str:
        self._known = None
        return token

    def reader(self, part: Part) -> list[str]:
        found = [one.id for one in self._list() if part.place in one.tags and _CONTENT in one.tags]
        if not part.place or not found:
            raise self.damaged(part, "it is not there")
        return self._words("dump", "--quiet", found[-1], f"/{part.place}")

    def collect(self, used: Iterable[Part]) -> int:
        """Of what no backup uses, only what this host has stored: another may be about to use its own."""
        wanted, here = {part.place for part in used}, socket.gethostname()
        going = [
            one.id
            for one in self._list()
            if _CONTENT in one.tags and one.host == here and not wanted.intersection(one.tags)
        ]
        if going:
            for start in range(0, len(going), 200):
                self._run("forget", "--quiet", *going[start : start + 200])
            self._run("prune", "--quiet")
            self._known = None
        return len(going)

    def find_free_bytes(self) -> int | None:
        """Unknown: restic stores only the pieces that it has not got yet."""
        return None

    def _list(self) -> list[_Snapshot]:
        """Every restic snapshot, oldest first; asked once until something changes."""
        if self._known is None:
            try:
                text = self._run("snapshots", "--json").decode()
                found = [
                    _parse_snapshot(item) for item in sorted(json.loads(text) or [], key=lambda item: item["time"])
                ]
            except (ValueError, KeyError, TypeError) as error:
                raise HostError(
                    f"restic's list of {self.text!r} makes no sense: {error}", hint="restic check"
                ) from error
            self._known = [snapshot for snapshot in found if snapshot is not None]
        return self._known

    def _read_manifest(self, snapshot: str) -> bytes:
        """Kept on this host until it is booted again: a restic snapshot never changes, and asking takes seconds."""
        call, folder = self.host.shell.call, self.host.store.run / "backups"
        path = folder / f"{snapshot}.json"
        if call(files.exists, path):
            return call(files.read_file, path, limit_bytes=manifest.MOST_BYTES)
        content = self._run("dump", snapshot, f"/{_MANIFEST}")
        if len(content) > manifest.MOST_BYTES:
            raise InvalidSpec("its manifest is too long", hint="restore another one")
        call(files.make_directory, folder, 0o700)
        call(files.write_file, path, content, 0o600)
        return content

    def _run(self, *words: str, stdin: bytes = b"") -> bytes:
        try:
            return self.host.shell.run(self._words(*words), timeout_s=_TIMEOUT_S, stdin=stdin).stdout
        except CommandFailed as error:
            if any(sign in error.stderr for sign in _NOT_THERE) and words[0] != "init":
                raise self._not_there() from error
            if "sftp session" in error.stderr:
                raise HostError(
                    f"cannot reach {self.text!r} over ssh: {error.stderr.strip().splitlines()[-1][:200]}",
                    hint="ssh to that host must work without a question: its key known, yours accepted there",
                ) from error
            if "wrong password" in error.stderr:
                raise HostError(f"the password is not that of {self.text!r}", hint="--password-file FILE") from error
            error.hint = error.hint or f"see what restic says: restic -r {self.location} check"
            raise

    def _words(self, *words: str) -> list[str]:
        password = ("--password-file", self._password_file) if self._password_file else ()
        # What is on this host is as quick to read as a copy of it.
        cache = ("--no-cache",) if self._path is not None else ()
        return ["restic", "--repo", self.location, *cache, *password, *words]

    def _require(self) -> None:
        if not self.host.shell.call(machine.find_program, ("restic",)):
            raise HostError("the program 'restic' is not installed on this host", hint="apt-get install restic")
        if self._password_file and not self.host.shell.call(files.exists, Path(self._password_file)):
            raise NotFound(f"there is no file {self._password_file!r}", hint="--password-file FILE")
        if not self._password_file and not any(os.environ.get(name) for name in _PASSWORDS):
            raise UsageError(
                "a restic repository needs its password", hint="--password-file FILE, or RESTIC_PASSWORD_FILE=FILE"
            )

    def _not_there(self) -> NotFound:
        return NotFound(
            f"{self.text!r} is no repository of restic's",
            hint=f"is its disk mounted? to make one there: hvctl backup init {shlex.quote(self.text)}",
        )


def _parse_snapshot(item: dict[str, object]) -> _Snapshot | None:
    """A restic snapshot; None for one that is nothing of ours to name."""
    identifier, tags = str(item["id"]), item.get("tags") or []
    assert isinstance(tags, list)
    if not _SNAPSHOT.fullmatch(identifier):
        return None
    return _Snapshot(id=identifier, tags=tuple(map(str, tags)), host=str(item.get("hostname", "")))


def _names_of(snapshot: _Snapshot) -> tuple[str, str]:
    """Name and identifier of the backup whose manifest it holds; empty for another."""
    facts = dict(tag.split("=", 1) for tag in snapshot.tags if "=" in tag)
    name, identifier = facts.get("name", ""), facts.get("id", "")
    with contextlib.suppress(HvctlError):
        if _BACKUP in snapshot.tags and check_name(name) and manifest.ID.fullmatch(identifier):
            return name, identifier
    return "", ""
