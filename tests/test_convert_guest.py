"""A real system changes its mode, there and back: the same files, users, key and address to whoever knocks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import gc, images
from hvctl.config import Config
from hvctl.host import Host
from hvctl.instances import lifecycle, query
from hvctl.model import Instance, Mode, Provision, State
from hvctl.rootfs import published
from hvctl.rootfs.sources import Wanted
from hvctl.units import GIB, MIB
from tests import world
from tests.cli import run
from tests.test_guest import make

pytestmark = pytest.mark.guest

NAME, FOREIGN = "turncoat", "foreign-turncoat"
_LIVE = """
useradd --uid 1234 --create-home alice
echo 'alice:secret' | chpasswd
install -o alice -g alice -m 0600 /dev/null /home/alice/diary
echo dear > /home/alice/diary
printf '#!/bin/sh\\necho served\\n' > /usr/local/bin/serve; chmod 4755 /usr/local/bin/serve
setcap cap_net_raw+ep /usr/local/bin/serve 2>/dev/null || :
rm /etc/motd
"""
_TELL = """
cat /etc/machine-id /home/alice/diary; grep alice /etc/passwd /etc/shadow; ls -ln /home/alice/diary /usr/local/bin/serve
hostname; test ! -e /etc/motd; ls /etc/ssh
"""


@pytest.fixture
def subject(host: Host, debian_image: str) -> Iterator[Instance]:
    """A running container; whatever has become of it is deleted, and then the world must be as before."""
    before = world.look(host)
    yield make(host, NAME, Mode.CONTAINER, debian_image)
    if query.find(host, NAME) is not None:
        lifecycle.delete(host, NAME)
    assert world.differences(before, world.look(host)) == []


def over_ssh(settings: Config, script: str) -> str:
    """What it says to whoever accepts only the pinned key."""
    done = run(settings, "ssh", NAME, "--", script)
    assert done.status == 0, done.err
    return done.out


def test_the_same_system_answers_at_the_same_address(host: Host, settings: Config, subject: Instance) -> None:
    over_ssh(settings, _LIVE)
    told = over_ssh(settings, _TELL)
    for mode in Mode.VM, Mode.CONTAINER:
        done = run(settings, "convert", NAME, "--to", mode.value, "--yes", "--json")
        assert done.status == 0, done.err
        facts = json.loads(done.out)
        assert (facts["mode"], facts["state"], facts["source"]) == (mode.value, "running", None)
        now = query.get(host, NAME).record
        for field in ("uuid", "address", "mac", "host_key"):
            assert getattr(now, field) == getattr(subject.record, field)
        assert over_ssh(settings, _TELL) == told
        assert gc.collect(host) == ()
    assert over_ssh(settings, "systemctl is-system-running --wait || systemctl --failed").strip() == "running"


def test_one_that_does_not_answer_is_what_it_was_and_runs(host: Host, settings: Config, subject: Instance) -> None:
    """Its sshd is broken before it is converted: nobody would ever answer."""
    over_ssh(settings, "echo kept > /root/kept; systemctl mask ssh.service; rm -f /etc/ssh/sshd_config.d/*")
    words = ("convert", NAME, "--to", "vm", "--yes", "--timeout", "3")
    done = run(settings, *words)
    assert done.status == 10, done.err
    assert "it is a container as before, and was started again" in done.err
    now = query.get(host, NAME)
    assert (now.record, now.state) == (subject.record, State.RUNNING)
    assert run(settings, "exec", NAME, "--", "cat", "/root/kept").out == "kept\n"


@pytest.mark.long
def test_a_foreign_system_with_cloud_init_boots_a_kernel_that_it_is_lent(
    host: Host, settings: Config, debian_image: str, tmp_path: Path
) -> None:
    """Its disk has partitions; nobody but cloud-init knows of hvctl there. As a container first, then as a VM, and back."""
    tree = host.store.image_tree(published.get_image(host, debian_image).id)
    raw, own = tmp_path / "disk.raw", tmp_path / "tree"
    subprocess.run(["cp", "--archive", str(tree), str(own)], check=True, timeout=120)
    words = ["rm", "-rf", *(f"{own}/{path}" for path in ("boot", "usr/lib/modules", "usr/lib/hvctl/kernel"))]
    subprocess.run(words, check=True, timeout=60)
    (own / "boot").mkdir()
    raw.touch()
    os.truncate(raw, 3 * GIB)
    subprocess.run(["sfdisk", "-q", str(raw)], input=b"label: gpt\nsize=8MiB\nsize=2GiB\n", check=True, timeout=30)
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={9 * MIB}", "-d", str(own), "--", str(raw), "2g"]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    images.bring(host, Wanted(name=FOREIGN, source=str(raw)))
    try:
        instance = make(host, NAME, Mode.CONTAINER, FOREIGN)
        assert instance.record.provision is Provision.NOCLOUD
        over_ssh(settings, "echo kept > /root/kept; cloud-init status --wait; echo > /var/log/cloud-init.log")
        for mode in Mode.VM, Mode.CONTAINER:
            done = run(settings, "convert", NAME, "--to", mode.value, "--yes")
            assert done.status == 0, done.err
            assert query.get(host, NAME).record.host_key == instance.record.host_key
            assert over_ssh(settings, "cat /root/kept; hostname") == f"kept\n{NAME}\n"
    finally:
        if query.find(host, NAME) is not None:
            lifecycle.delete(host, NAME)
        images.delete(host, FOREIGN)
