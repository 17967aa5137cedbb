"""The state of an emulated TPM: kept, put beside, swapped in, for the same domain or another."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvctl.hostside import tpm


def test_what_was_kept_comes_back_and_goes_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpm, "_FOLDER", tmp_path / "swtpm")
    kept = tmp_path / "kept"
    kept.mkdir()
    state = tmp_path / "swtpm" / "one" / "tpm2" / "tpm2-00.permall"
    (tmp_path / "swtpm").mkdir()
    tpm.keep("one", kept)  # it never ran
    tpm.take("one", kept)
    tpm.swap("one")
    assert not state.parent.exists()

    state.parent.mkdir(parents=True)
    state.write_bytes(b"then")
    tpm.keep("one", kept)
    state.write_bytes(b"now")
    tpm.take("one", kept)
    assert state.read_bytes() == b"now"
    tpm.discard("one")
    tpm.swap("one")
    assert state.read_bytes() == b"now"
    for uuid in ("one", "two"):
        tpm.take(uuid, kept)
        tpm.swap(uuid)
        tpm.swap(uuid)
        found = tmp_path / "swtpm" / uuid / "tpm2" / "tpm2-00.permall"
        assert (found.read_bytes(), found.stat().st_mode & 0o777) == (b"then", 0o600)
        assert [path.name for path in found.parent.iterdir()] == [found.name]
