"""Which repository a user means: `/srv/backups`, `restic:/srv/restic`, `restic:sftp:user@host:/path`."""

from __future__ import annotations

from pathlib import Path

from hvctl.backups.directory import Directory
from hvctl.backups.repository import Repository
from hvctl.backups.restic import Restic
from hvctl.errors import InvalidSpec, UsageError
from hvctl.host import Host

_RESTIC = "restic:"


def open_repository(host: Host, text: str, *, password_file: str = "") -> Repository:
    """The repository of this name; whether it is there is not looked at. Raises InvalidSpec, UsageError for none."""
    text = text or host.config.backups
    if not text:
        raise UsageError(
            "which repository of backups?",
            hint='--repo /srv/backups, or a setting: backups = "/srv/backups" in /etc/hvctl/config.toml',
        )
    if not text.isprintable():
        raise InvalidSpec(f"{text[:80]!r} cannot be a repository", hint="--repo /srv/backups")
    if text.startswith(_RESTIC):
        return Restic(host, text, password_file=password_file)
    if password_file:
        raise UsageError("a directory has no password; a restic repository has", hint="--repo restic:/srv/restic")
    if ":" in text.partition("/")[0]:
        raise InvalidSpec(
            f"{text[:80]!r} is no kind of repository", hint="a directory, restic:/PATH, restic:sftp:HOST:/PATH"
        )
    return Directory(host, str(Path(text).absolute()))
