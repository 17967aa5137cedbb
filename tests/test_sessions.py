"""A run of the tests that was killed: the next one takes away what it left, and nothing of one that lives."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from pathlib import Path

import pytest

from hvctl import hostsetup
from hvctl.config import Config
from hvctl.host import Host
from hvctl.instances import create
from hvctl.model import Mode
from tests import campaign, sessions, tiny, victims, world

pytestmark = [pytest.mark.guest, pytest.mark.apart]


def _live_and_die(_host: Host, token: str) -> None:
    with sessions.begin(token) as settings, Host(settings) as host:
        hostsetup.setup(host)
        tiny.publish(host, "tiny")
        create.create(host, create.Request(spec=tiny.make_spec("left-behind", Mode.CONTAINER), start=False))
        with campaign.prepared(settings):
            os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_goes_with_the_next(host: Host, settings: Config) -> None:
    token = secrets.token_hex(3)

    def look() -> tuple[object, ...]:
        """What is of others is not looked at: runs beside this one come and go."""
        networks = [item.name() for item in host.connection(Mode.VM).handle.listAllNetworks()]
        paths = [str(path) for folder in ("/var/lib", "/run") for path in Path(folder).iterdir()]
        return world.look(host), sorted(name for name in (*networks, *paths) if token in name)

    before = look()
    victims.die_in(settings, _live_and_die, token)
    assert sessions.small_store(sessions.settings_of(token)).is_mount()
    names = {domain.name() for mode in Mode for domain in host.connection(mode).handle.listAllDomains()}
    assert len({"left-behind"} & names) == 1 and len([name for name in names if name.startswith("bystander-")]) >= 2
    found = sessions.collect()
    assert token in found and settings.network not in map("hvtest{}".format, found)  # this one lives
    assert look() == before
    assert token not in sessions.collect()


def test_what_is_of_a_world_in_which_somebody_lives_is_not_touched(host: Host) -> None:
    """Its domains are not seen from here."""
    token = secrets.token_hex(3)
    store, file = (Path(f"/var/lib/hvctl-test-{token}{end}") for end in ("", ".session"))
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"\n"
        try:
            store.mkdir()
            file.write_text(os.readlink(f"/proc/{other.pid}/ns/net"))
            assert token not in sessions.collect()
            assert store.is_dir() and file.exists()
        finally:
            other.kill()
            file.unlink()
            store.rmdir()
