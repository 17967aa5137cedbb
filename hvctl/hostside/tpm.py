"""The state of an emulated TPM, which swtpm keeps below libvirt's directory, by the domain's UUID."""

from __future__ import annotations

import os
from pathlib import Path

from hvctl.hostside import files

_FOLDER = Path("/var/lib/libvirt/swtpm")
_NAME = "tpm2-00.permall"
_KEPT = "tpm.permall"


def keep(uuid: str, folder: Path) -> None:
    """Copy it into a directory; fine when there is none yet."""
    if files.exists(_state(uuid)):
        files.clone_file(_state(uuid), folder / _KEPT, 0o600)


def take(uuid: str, folder: Path) -> None:
    """Put what was kept beside the state of this domain, as swtpm's own; fine when nothing was."""
    if not files.exists(folder / _KEPT):
        return
    state = _state(uuid)
    owner = os.stat(state if files.exists(state) else _FOLDER)
    for path in (_FOLDER / uuid, state.parent):
        if not files.exists(path):
            files.make_directory(path, 0o711 if path.name == uuid else 0o700)
            files.set_owner(path, owner.st_uid, owner.st_gid)
    files.remove(_aside(state))
    files.clone_file(folder / _KEPT, _aside(state), 0o600)
    files.set_owner(_aside(state), owner.st_uid, owner.st_gid)


def swap(uuid: str) -> None:
    """Give what was put beside it the state's name; fine when there is none."""
    if files.exists(_aside(_state(uuid))):
        files.replace_if_there(_aside(_state(uuid)), _state(uuid))


def discard(uuid: str) -> None:
    """Remove what was put beside it."""
    files.remove(_aside(_state(uuid)))


def _state(uuid: str) -> Path:
    return _FOLDER / uuid / "tpm2" / _NAME


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")
