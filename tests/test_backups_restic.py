"""restic repositories: local, and over sftp to a real OpenSSH server on loopback. No libvirt is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.backups import create, manifest
from hvctl.backups.opening import open_repository
from hvctl.backups.restic import Restic
from hvctl.errors import HvctlError, InvalidSpec
from hvctl.events import ignore
from hvctl.host import Host
from hvctl.hostside import transfer
from hvctl.hostside.transfer import Source
from hvctl.model import Mode
from tests import stores
from tests.test_backups_hostile import make_backup, part
from tests.test_ssh import Server

# These need openssh-server, restic and root, which scripts/test has; and take seconds.
pytestmark = [pytest.mark.guest, pytest.mark.apart]


@pytest.fixture
def host(tmp_path: Path, users_home: Path) -> Host:
    return stores.make(tmp_path)


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("nobody's\n")
    return path


def open_at(host: Host, text: str, password: Path) -> Restic:
    found = open_repository(host, text, password_file=str(password))
    assert isinstance(found, Restic)
    return found


def keep(repository: Restic, folder: Path, content: bytes) -> manifest.Part:
    (folder / "content").write_bytes(content)
    source = Source(kind=transfer.FILE, path=str(folder / "content"))
    return repository.store(source, part("layer0"), folder / "scratch", ignore, "web")[0]


def test_content_and_manifests_come_back_and_go(host: Host, tmp_path: Path, password: Path) -> None:
    repository = open_at(host, f"restic:{tmp_path / 'restic'}", password)
    assert repository.make() and not repository.make()
    noise = os.urandom(3_000_000)
    one, other = keep(repository, tmp_path, noise), keep(repository, tmp_path, b"leftover")
    backup = make_backup(Mode.VM)
    backup = replace(backup, base_parts=(), layers=(one,), state=one, volumes=())
    repository.write_manifest(backup, manifest.format_backup(backup))
    assert [entry.backup for entry in repository.list_entries()] == [backup]
    assert create.collect(repository, repository.list_entries()) == 1 and not repository.has(other)
    assert repository.has(one)
    repository.load(one, tmp_path / "back", ignore, "web")
    assert (tmp_path / "back").read_bytes() == noise
    with pytest.raises(InvalidSpec, match="not there"):
        repository.load(other, None, ignore, "web")
    with pytest.raises(InvalidSpec, match="another than"):
        repository.load(replace(one, sha256="0" * 64), None, ignore, "web")

    seen = b"".join(path.read_bytes() for path in (tmp_path / "restic").rglob("*") if path.is_file())
    assert noise[:4096] not in seen and b"layer0" not in seen  # encrypted
    packs = sorted(
        (tmp_path / "restic" / "data").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    packs[-1].write_bytes(b"x" * packs[-1].stat().st_size)
    with pytest.raises(InvalidSpec, match="damaged"):
        repository.load(one, None, ignore, "web")

    wrong = tmp_path / "wrong"
    wrong.write_text("x\n")
    with pytest.raises(HvctlError, match="password"):
        open_at(host, f"restic:{tmp_path / 'restic'}", wrong).check()
    with pytest.raises(HvctlError, match="no repository"):
        open_at(host, f"restic:{tmp_path / 'none'}", password).check()
    entry = repository.list_entries()[0]
    repository.remove_manifest(entry)
    assert repository.list_entries() == []


def test_a_source_that_fails_half_way_is_no_content(host: Host, tmp_path: Path, password: Path) -> None:
    """restic must not take its end for the end of the whole."""
    repository = open_at(host, f"restic:{tmp_path / 'restic'}", password)
    repository.make()
    source = Source(kind=transfer.TREE, path=str(tmp_path / "none"), name="upper")
    with pytest.raises(HvctlError):
        repository.store(source, part("layer0"), tmp_path / "scratch", ignore, "web")
    words = ["restic", "--repo", str(tmp_path / "restic"), "--password-file", str(password), "snapshots", "--json"]
    assert subprocess.run(words, capture_output=True, check=True, timeout=60).stdout.strip() in (b"null", b"[]")


@pytest.fixture
def server(users_home: Path, tmp_path: Path) -> Iterator[Server]:
    """A server with sftp that knows hvctl's own key, and that ssh of this user knows."""
    started = Server(tmp_path / "server", "Subsystem sftp internal-sftp\n")
    yield started
    started.close()


def test_over_sftp_too(
    host: Host, tmp_path: Path, password: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("ssh") is None:
        pytest.skip("no ssh here")
    # OpenSSH asks the password database, not HOME, for where its files are: so its own command for this one server.
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{server.endpoint.port} {server.endpoint.host_key}\n")
    key = Path(os.environ["HOME"], ".local/share/hvctl/ssh/id_ed25519")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "ssh"
    options = f"-F none -o IdentityFile={key} -o UserKnownHostsFile={tmp_path}/known_hosts -o BatchMode=yes"
    command.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    target = tmp_path / "far"
    repository = open_at(host, f"restic:sftp://root@127.0.0.1:{server.endpoint.port}/{target}", password)
    with pytest.raises(HvctlError, match="no repository"):
        repository.check()
    assert repository.make()
    noise = os.urandom(100_000)
    one = keep(repository, tmp_path, noise)
    repository.load(one, tmp_path / "back", ignore, "web")
    assert (tmp_path / "back").read_bytes() == noise
    assert (target / "config").exists()
    (tmp_path / "known_hosts").write_text("")
    with pytest.raises(HvctlError, match="over ssh"):  # a server that ssh does not know
        open_at(host, repository.text, password).check()
