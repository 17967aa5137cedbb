"""Key pairs: made by ssh-keygen, and gone with whoever made them."""

from __future__ import annotations

import os
import subprocess
import sys
from base64 import b64decode, b64encode
from pathlib import Path

import pytest

from hvctl import identity
from hvctl.access import keys
from hvctl.errors import HostError, InvalidSpec


def test_a_key_pair_belongs_together(tmp_path: Path) -> None:
    pair = keys.new_pair()
    assert identity.check_public_key(f"{pair.public} somebody@somewhere") == f"{pair.public} somebody@somewhere"
    assert b"PRIVATE" not in repr(pair).encode()
    path = tmp_path / "key"
    path.write_bytes(pair.private)
    path.chmod(0o600)
    derived = subprocess.run(["ssh-keygen", "-y", "-f", path], capture_output=True, text=True, check=True).stdout
    assert derived.split()[:2] == pair.public.split()


def test_pairs_begun_ahead_are_different() -> None:
    takes = [keys.begin_pair() for _time in range(3)]
    assert len({take().public for take in takes}) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a file system of its own for them")
def test_making_a_pair_leaves_nothing_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while it is being made: the program is told a path that nobody else has."""
    said = tmp_path / "said"
    program = tmp_path / "ssh-keygen"
    program.write_text(f'#!/bin/sh\nexec >> {said}\nshift 7\nstat -f -c %T "${{2%/*}}/"\nexit 7\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="status 7"):
        keys.new_pair()
    assert said.read_text().split()[0] == "tmpfs"
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("said", "ssh-keygen")] == []


def test_without_ssh_keygen_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="'ssh-keygen' is not installed"):
        keys.begin_pair()()


def damaged(deed: str) -> bytes:
    """The file of a private key with something wrong."""
    key, other = (keys.new_pair() for _key in range(2))
    data, others = (b64decode(b"".join(pair.private.splitlines()[1:-1])) for pair in (key, other))
    public, others_public = (b64decode(pair.public.split()[1]) for pair in (key, other))
    end = data.index(public) + len(public)
    changed = {
        "cut off after its public half": data[:end],
        "cut off in its private half": data[: end + 90],
        "private half overwritten": data[:end] + bytes(len(data) - end),
        "private half of another": data[:end] + others[others.index(others_public) + len(public) :],
        "for a passphrase": data.replace(b"none", b"nine", 1),
        "of another type": data.replace(b"ssh-ed25519", b"ssh-ed25520"),
    }[deed]
    return b"\n".join((key.private.splitlines()[0], b64encode(changed), key.private.splitlines()[-1]))


def test_a_private_key_is_read_however_its_lines_are_broken() -> None:
    key = keys.new_pair()
    first, *lines, last = key.private.splitlines()
    assert identity.public_of(b"\r\n".join((first, b"".join(lines), last))) == key.public


DAMAGES = (
    "cut off after its public half",
    "cut off in its private half",
    "private half overwritten",
    "private half of another",
    "for a passphrase",
    "of another type",
)


@pytest.mark.parametrize("deed", DAMAGES)
def test_a_damaged_private_key_is_told(deed: str) -> None:
    with pytest.raises(InvalidSpec, match="not a whole one"):
        identity.public_of(damaged(deed))


@pytest.mark.skipif(os.geteuid() != 0, reason="whoever is not root may not anyway")
def test_a_root_who_may_not_mount_makes_keys() -> None:
    """As in a plain Docker container."""
    words = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c"]
    script = "from hvctl.access import keys; print(keys.new_pair().public)"
    done = subprocess.run([*words, script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("ssh-ed25519 ")


@pytest.mark.parametrize("content", [b"", b"nothing", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_what_is_no_private_key_is_told(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSpec, match="no private ssh key"):
        identity.public_of(content)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = keys.own_key_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(HostError, match="is damaged"):
        keys.ensure_own_key()
