"""Key pairs: made by ssh-keygen, and gone with whoever made them."""

from __future__ import annotations

import os
import subprocess
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
