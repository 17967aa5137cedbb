"""A repository that is a directory: content under its digest, compressed by zstd, and manifests. docs/backups.md has the form.

hvctl-backups.json           says that this is one
blobs/AB/SHA256.zst          content, by the digest of what is in it; written aside, synced, renamed
backups/NAME/ID.json         a manifest; written last, removed first
partial/                     what is being written
lock                         held by whoever changes it
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvctl import identity
from hvctl.backups import manifest
from hvctl.backups.manifest import Backup, Part
from hvctl.backups.repository import Entry, Repository
from hvctl.errors import AlreadyExists, HostError, HvctlError, InvalidSpec, NotFound, Unsupported, WrongState
from hvctl.host import Host
from hvctl.hostside import files, locks, sandbox
from hvctl.hostside.sandbox import Confinement
from hvctl.hostside.transfer import Moved
from hvctl.units import GIB, MIB

_FORMAT, _SCHEMA = "hvctl-backups", 1
_MARK = "hvctl-backups.json"
_FOLDERS = ("blobs", "backups", "partial")
_BLOB = re.compile(r"[0-9a-f]{64}\.zst", re.ASCII)
_LOCK_TIMEOUT_S = 4 * 3600


class Directory(Repository):
    """A directory of this host's, on whatever file system."""

    def __init__(self, host: Host, text: str) -> None:
        super().__init__(host, text)
        self.path = Path(text)

    def make(self) -> bool:
        call = self.host.shell.call
        if call(files.exists, self.path / _MARK):
            self.check()
            return False
        if call(files.exists, self.path) and set(call(files.list_names, self.path)) - {*_FOLDERS, "lost+found"}:
            raise AlreadyExists(f"{self.text!r} is not empty", hint="name a new or an empty directory")
        if not call(files.is_directory, self.path.parent):
            parent = str(self.path.parent)
            raise HostError(f"there is no directory {parent!r}", hint=f"mkdir -p {shlex.quote(parent)}")
        for path in (self.path, *(self.path / name for name in _FOLDERS)):
            call(files.make_directory, path, 0o700)
        content = json.dumps({"format": _FORMAT, "schema": _SCHEMA}).encode() + b"\n"
        call(files.write_file, self.path / _MARK, content, 0o600)
        return True

    def check(self) -> None:
        call = self.host.shell.call
        if not call(files.is_regular, self.path / _MARK):
            raise NotFound(
                f"{self.text!r} is no repository of backups",
                hint=f"is its disk mounted? to make one there: hvctl backup init {shlex.quote(self.text)}",
            )
        try:
            facts = json.loads(call(files.read_file, self.path / _MARK, limit_bytes=4096))
            is_ours, schema = facts["format"] == _FORMAT, int(facts["schema"])
        except (ValueError, KeyError, TypeError) as error:
            raise HostError(f"{str(self.path / _MARK)!r} is damaged: {error}", hint="restore that file") from error
        if not is_ours or schema > _SCHEMA:
            raise Unsupported(f"{self.text!r} was made by a newer hvctl", hint="upgrade hvctl on this machine")
        for name in _FOLDERS:
            path = self.path / name
            if not call(files.is_plain_directory, path):
                raise HostError(f"{str(path)!r} is no directory", hint="it was one when the repository was made")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.hold(self.path / "lock", timeout_s=_LOCK_TIMEOUT_S))
            except BlockingIOError as error:
                raise WrongState(
                    f"{self.text!r} is busy: another hvctl writes to it",
                    hint=f"fuser -v {shlex.quote(str(self.path / 'lock'))}",
                ) from error
            except OSError as error:
                raise HostError(f"cannot write to {self.text!r}: {error.strerror}", hint="look at its owner") from error
            yield

    def read_manifests(self) -> Iterator[tuple[str, str, bytes | str]]:
        call, top = self.host.shell.call, self.path / "backups"
        for name in call(files.list_names, top):
            if not _is_name(name) or not call(files.is_plain_directory, top / name):
                continue
            for file in call(files.list_names, top / name):
                identifier = file.removesuffix(".json")
                if identifier == file or not manifest.ID.fullmatch(identifier):
                    continue
                try:
                    content: bytes | str = call(files.read_file, top / name / file, limit_bytes=manifest.MOST_BYTES)
                except HvctlError as error:
                    content = error.message
                yield name, identifier, content

    def write_manifest(self, backup: Backup, content: bytes) -> None:
        call, folder = self.host.shell.call, self.path / "backups" / backup.name
        call(files.make_directory, folder, 0o700)
        call(files.sync_directory, folder.parent)
        call(files.write_file, folder / f"{backup.id}.json", content, 0o600)

    def remove_manifest(self, entry: Entry) -> None:
        call, folder = self.host.shell.call, self.path / "backups" / entry.name
        call(files.remove, folder / f"{entry.id}.json")
        if call(files.is_directory, folder):
            call(files.sync_directory, folder)
        call(files.remove_empty, folder)

    def has(self, part: Part) -> bool:
        path = self._blob(part.sha256)
        return self.host.shell.call(files.is_regular, path) and self.host.shell.call(files.size, path) > 0

    def plan(self, token: str) -> tuple[list[str], Path | None]:
        return ["zstd", "-q", "-T0", "-c"], self.path / "partial" / token

    def keep(self, token: str, moved: Moved) -> str:
        call, blob = self.host.shell.call, self._blob(moved.sha256)
        call(files.make_directory, blob.parent, 0o700)
        call(files.sync_directory, blob.parent.parent)
        # In place of one that is there, which may be damaged.
        call(files.replace_if_there, self.path / "partial" / token, blob)
        return ""

    def reader(self, part: Part) -> list[str]:
        blob = self._blob(part.sha256)
        if not self.host.shell.call(files.is_regular, blob):
            raise self.damaged(part, "it is not there")
        is_plain = self.host.shell.call(sandbox.is_plainly_readable, blob)
        confinement = Confinement(
            directory=self.path / "partial",
            is_read_only=True,
            read_only=((blob, sandbox.place_input(0)),),
            capabilities=() if is_plain else sandbox.READ_ANY_OWNER,
            cpu_s=600 + part.size_bytes // (16 * MIB),
            memory_bytes=GIB,
        )
        return sandbox.command(confinement, ["zstd", "-dcq", "--memory=256MB", "--", sandbox.place_input(0)])

    def collect(self, used: Iterable[Part]) -> int:
        call, top, count = self.host.shell.call, self.path / "blobs", 0
        wanted = {f"{part.sha256}.zst" for part in used}
        for name in call(files.list_names, self.path / "partial"):
            call(files.remove, self.path / "partial" / name)
            count += 1
        for folder in call(files.list_names, top):
            for name in call(files.list_names, top / folder):
                if _BLOB.fullmatch(name) and name not in wanted:
                    call(files.remove, top / folder / name)
                    count += 1
            call(files.remove_empty, top / folder)
        return count

    def find_free_bytes(self) -> int | None:
        return self.host.shell.call(files.available_bytes, self.path)

    def _blob(self, sha256: str) -> Path:
        return self.path / "blobs" / sha256[:2] / f"{sha256}.zst"


def _is_name(name: str) -> bool:
    try:
        return identity.check_name(name) == name
    except InvalidSpec:
        return False
