"""What a shell completes: names of what is there, in a moment, and nothing at all where nobody may look."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from click.shell_completion import ShellComplete

from hvctl import metadata
from hvctl.cli import completion
from hvctl.cli.main import hvctl
from hvctl.config import Config
from hvctl.host import Host
from hvctl.instances.examples import make_record
from hvctl.libvirtapi import domains
from hvctl.model import DataDisk, DiskKind, Mode, Snapshot, VolumeFormat
from tests import stores
from tests.cli import TIMEOUT_S, environment

VERBS = (
    *("start", "stop", "restart", "pause", "resume", "delete", "show", "usage", "logs", "ssh", "exec", "console"),
    *("set", "kernel", "rename", "copy", "convert"),
)


def complete(*words: str) -> list[str]:
    """What the last word, which is incomplete, may become."""
    found = ShellComplete(hvctl, {}, "hvctl", "_HVCTL_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users_home: Path) -> Iterator[Host]:
    """Settings whose libvirt is the test driver with `web` and `work`, and whose store names two images."""
    with stores.make(tmp_path) as host:
        for name in ("web", "work"):
            snapshots = tuple(
                Snapshot(id=str(uuid4()), name=f"{name}-{when}", layer=str(uuid4()), mode=Mode.VM) for when in "ab"
            )
            disk = DataDisk(name="data", kind=DiskKind.ISO, format=VolumeFormat.RAW, source="/srv/a.iso")
            record = make_record(Mode.VM, "default", host.store.root, {})
            record = replace(
                record, uuid=uuid4(), spec=replace(record.spec, name=name), snapshots=snapshots, disks=(disk,)
            )
            xml = (
                f"<domain type='test'><name>{name}</name><uuid>{record.uuid}</uuid><memory>131072</memory>"
                "<os><type>hvm</type></os></domain>"
            )
            domains.define(host.connection(Mode.VM), metadata.embed(xml, record))
        for image in ("debian-12", "web-base"):
            (host.store.tags / image).write_text("0" * 64 + "\n")
        for key, value in environment(host.config).items():
            monkeypatch.setenv(key, value)
        yield host


@pytest.mark.parametrize("line", VERBS)
def test_a_verb_knows_instances(there: Host, line: str) -> None:
    assert complete(line, "w") == ["web", "work"]
    assert complete(line, "wo") == ["work"]


def test_a_name_is_given_once(there: Host) -> None:
    assert complete("start", "web", "") == ["work"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("snapshot take ", ["web", "work"]),
        ("snapshot revert web ", ["web-a", "web-b"]),
        ("snapshot show work ", ["work-a", "work-b"]),
        ("snapshot delete web web-a ", ["web-b"]),
        ("snapshot diff web web-a ", ["web-b"]),
        ("backup create w", ["web", "work"]),
        ("disk list ", ["web", "work"]),
        ("disk resize web ", ["data", "root"]),
        ("disk move web data ", ["web", "work"]),
        ("image show ", ["debian-12", "web-base"]),
        ("image delete web-base ", ["debian-12"]),
        ("image export w", ["web-base"]),
        ("image publish w", ["web", "work"]),
        ("image pull fedora", ["fedora-43"]),
        ("run d", ["debian-12"]),
        ("create x --image ", ["debian-12", "web-base"]),
        ("create x --template u", ["uefi"]),
        ("create x --container --template host", ["host-network"]),
        ("create x --template ./m", ["./m"]),
        ("template show --container d", ["default"]),
        ("create w", []),
        ("exec web -- w", []),
    ],
)
def test_a_name_is_completed_by_what_it_is_of(there: Host, line: str, found: list[str]) -> None:
    assert complete(*line.split(" ")) == found


@pytest.mark.parametrize("line", ["start ", "snapshot revert web ", "create x --image ", "disk resize web "])
def test_where_nothing_can_be_seen_nothing_is_said(
    settings: Config, users_home: Path, tmp_path: Path, line: str
) -> None:
    """Neither by who may not look, nor without a store, nor without libvirt."""
    uris = {f"{mode}_uri": "qemu+unix:///system?socket=/nosuch" for mode in Mode}
    nothing = replace(settings, store=tmp_path / "none", **uris)
    words = {"COMP_WORDS": f"hvctl {line}", "COMP_CWORD": str(line.count(" ") + 1), "_HVCTL_COMPLETE": "bash_complete"}
    for user in (None, 65534) if os.geteuid() == 0 else (None,):
        done = subprocess.run(
            [sys.executable, "-m", "hvctl"],
            capture_output=True,
            env={**environment(settings if user else nothing), **words},
            user=user,
            group=user,
            extra_groups=[] if user else None,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"", b"")


def test_nobody_waits_for_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def hang(*_words: object) -> list[str]:
        ended.wait(TIMEOUT_S)
        return ["late"]

    monkeypatch.setattr(completion, "_DEADLINE_S", 0.05)
    monkeypatch.setattr(completion.INSTANCE, "_find", hang)
    assert complete("start", "") == []
    ended.set()
